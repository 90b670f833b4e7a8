"""One file, judged: a weight against its base on every split of a folder of specs.

    accepted = judge_file(Path("x.dat"), model=None, base=None, specs=Path("specs"), template="chat")
    accepted.assessment.green, accepted.evaluation.outcomes

The pytest plugin and the fresh process that ends ``align run`` both go through here, so that neither can be greener
than the other. Replies of both files go through the reply cache, keyed by their hashes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from alignment.cache import ReplyCache
from alignment.evaluate import Evaluation, Evaluator
from alignment.gate import Assessment, assess
from alignment.manifest import ManifestError, base_of, model_folder_of
from alignment.spec import SPLITS, SpecError
from alignment.suite import collect
from trainer.dat import DatReader
from trainer.dat_errors import DatError
from trainer.generate import NonFiniteError
from trainer.model import ModelError, Template, load

INPUT_ERRORS = (DatError, ManifestError, ModelError, NonFiniteError, OSError, SpecError)
"""What is wrong with the files given to ``judge_file``: the user's to mend, in one line (``one_line``)."""

Progress = Callable[[Literal["base", "weight"], int, int], None]
"""Told which file is being asked, replies done, replies in all."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What one file is worth."""

    evaluation: Evaluation
    """Every case of every split."""
    assessment: Assessment
    weight_sha256: str
    base_sha256: str


def judge_file(
    weight: Path,
    *,
    model: Path | None,
    base: Path | None,
    specs: Path,
    template: Template,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> Acceptance:
    """Judge ``weight`` on all specs of the folder ``specs``. Raises ``INPUT_ERRORS``.

    ``model`` and ``base`` default to what the weight's manifest names, ``base`` then to ``base.dat`` in the model
    folder. ``device`` ``auto`` is CUDA where there is one. At most one of the two models is in memory at a time.
    """
    suite = collect(specs)
    folder = model_folder_of(weight, model)
    base = base_path(weight, folder, base)
    check_headers(weight)
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    base_lm = load(base, folder=folder, device=chosen)
    evaluator = Evaluator(
        base_lm,
        suite,
        splits=SPLITS,
        template=template,
        cache=ReplyCache(),
        progress=(lambda done, total: progress("base", done, total)) if progress else None,
    )
    base_sha256 = base_lm.weights_sha256
    lm = base_lm if weight.samefile(base) else None
    del base_lm  # a base of 8 GB must not stay beside the candidate
    lm = lm or load(weight, folder=folder, device=chosen)
    evaluation = evaluator(
        lm,
        *SPLITS,
        cached=True,
        progress=(lambda done, total: progress("weight", done, total)) if progress else None,
    )
    return Acceptance(
        evaluation=evaluation,
        assessment=assess(evaluation),
        weight_sha256=lm.weights_sha256,
        base_sha256=base_sha256,
    )


def base_path(weight: Path, folder: Path, explicit: Path | None) -> Path:
    """The .dat that ``weight`` is compared with. Raises ManifestError when there is none."""
    base = explicit or base_of(weight) or folder / "base.dat"
    if not base.is_file():
        raise ManifestError(f"{base}: no such file to compare {weight.name} with; pass --base FILE")
    return base


def check_headers(weight: Path) -> None:
    """Read the headers only. Raises DatError or OSError: not a .dat, or one that was cut short."""
    with DatReader(weight) as reader:
        reader.pairs()


def one_line(error: Exception, path: Path | None = None) -> str:
    """An input error as one line that names the file."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        path, text = Path(error.filename) if isinstance(error.filename, str) else path, error.strerror
    return f"{path}: {text}" if path is not None and path.name not in text else text
