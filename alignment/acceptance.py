"""One file, judged: a weight against its base on every split of a folder of specs.

    accepted = judge_file(Path("x.dat"), model=None, base=None, specs=Path("specs"), template="chat")
    accepted.assessment.green, accepted.evaluation.outcomes

    python -m alignment.acceptance x.dat --json answer.json        # in a process of its own, and in both numerics

The pytest plugin and the fresh process that ends ``align run`` both go through here, so that neither can be greener
than the other. Replies of both files go through the reply cache, keyed by their hashes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from alignment.cache import ReplyCache
from alignment.evaluate import Evaluation, Evaluator, Outcome, judge_reply
from alignment.gate import DRIFT_BOUND, USAGE_ERROR, Assessment, assess
from alignment.manifest import ManifestError, base_of, model_folder_of
from alignment.spec import SPLITS, SpecError
from alignment.suite import Suite, collect
from trainer.dat import DatReader
from trainer.dat_errors import DatError
from trainer.files import atomic_write
from trainer.generate import NonFiniteError, Reply, generate
from trainer.model import LanguageModel, ModelError, Template, load
from trainer.numerics import Numerics
from trainer.numerics import other as other_numerics

INPUT_ERRORS = (DatError, ManifestError, ModelError, NonFiniteError, OSError, SpecError)
"""What is wrong with the files given to ``judge_file``: the user's to mend, in one line (``one_line``)."""

NARROW = {torch.float32: 0.01, torch.bfloat16: 0.5}
"""A reply with a decision narrower than this many nats may come out otherwise in another batch, by arithmetic."""

LONE = 12
"""Cases of a kind that are asked alone at the end of a run: on two cores each takes about half a second."""

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
    unstable: list[dict[str, str]] = dataclasses.field(default_factory=list)
    """Passing cases whose reply fails at batch size 1 (``alone``): id, batched, alone."""
    drift_bound: float = DRIFT_BOUND
    numerics: Numerics = "weights"
    """Of ``evaluation`` and ``assessment``."""
    other: Evaluation | None = None
    """The same cases in the other numerics, against the base in these (``both``). Decides nothing."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, for another process (``from_json``)."""
        return {
            "evaluation": _plain(self.evaluation),
            "other": _plain(self.other) if self.other else None,
            **{key: getattr(self, key) for key in _AS_THEY_ARE},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], suite: Suite) -> Acceptance:
        """What ``to_json`` gave, with the cases of the same suite. Raises KeyError for a case of another suite."""
        evaluation = _evaluation(data["evaluation"], suite)
        return cls(
            evaluation=evaluation,
            assessment=assess(evaluation, drift_bound=data["drift_bound"]),
            other=_evaluation(data["other"], suite) if data["other"] else None,
            **{key: data[key] for key in _AS_THEY_ARE},
        )


_AS_THEY_ARE = ("weight_sha256", "base_sha256", "unstable", "drift_bound", "numerics")


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    outcomes = [
        {"id": o.case.id} | {f.name: getattr(o, f.name) for f in dataclasses.fields(o) if f.name != "case"}
        for o in evaluation.outcomes
    ]
    for row in outcomes:
        row |= {key: dataclasses.asdict(row[key]) for key in ("reply", "base_reply")}
    return {"outcomes": outcomes, "seconds": evaluation.seconds}


def _evaluation(data: dict[str, Any], suite: Suite) -> Evaluation:
    cases = {case.id: case for case in suite.cases}
    outcomes = tuple(
        Outcome(
            case=cases[row["id"]],
            reply=_reply(row["reply"]),
            base_reply=_reply(row["base_reply"]),
            failures=tuple(row["failures"]),
            base_failures=tuple(row["base_failures"]),
            drift=row["drift"],
            base_margin=row["base_margin"],
            hijacked=row["hijacked"],
        )
        for row in data["outcomes"]
    )
    return Evaluation(outcomes=outcomes, splits=SPLITS, seconds=data["seconds"])


def _reply(data: dict[str, Any]) -> Reply:
    return Reply(**{**data, "tokens": tuple(data["tokens"]), "margins": tuple(data["margins"])})


def pick_device(device: str | torch.device) -> torch.device:
    """``auto`` is CUDA where there is one. Raises ModelError when CUDA is asked for where there is none."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"--device {device}: torch finds no CUDA device here; use auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def judge_file(
    weight: Path,
    *,
    model: Path | None,
    base: Path | None,
    specs: Path,
    template: Template,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
    drift_bound: float = DRIFT_BOUND,
    alone: bool = False,
    numerics: Numerics = "weights",
    both: bool = False,
) -> Acceptance:
    """Judge ``weight`` on all specs of the folder ``specs``, both files in ``numerics``. Raises ``INPUT_ERRORS``.

    ``model`` and ``base`` default to what the weight's manifest names, ``base`` then to ``base.dat`` in the model
    folder. ``alone``: also ask narrowly decided cases one by one. ``both``: also ask everything in the other numerics.
    At most one of the two models is in memory at a time, and each is loaded once.
    """
    suite = collect(specs)
    folder = model_folder_of(weight, model)
    base = base_path(weight, folder, base)
    check_headers(weight)
    chosen = pick_device(device)
    base_lm = load(base, folder=folder, device=chosen)
    asked: tuple[Numerics, ...] = (numerics, other_numerics(numerics)) if both else (numerics,)
    evaluators: dict[Numerics, Evaluator] = {}
    for each in asked:
        base_lm.use(each)
        evaluators[each] = Evaluator(
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
    evaluations: list[Evaluation] = []
    for each in asked:
        lm.use(each)
        evaluations.append(
            evaluators[each](
                lm,
                *SPLITS,
                cached=True,
                progress=(lambda done, total: progress("weight", done, total)) if progress else None,
            )
        )
    lm.use(numerics)
    return Acceptance(
        evaluation=evaluations[0],
        assessment=assess(evaluations[0], drift_bound=drift_bound),
        weight_sha256=lm.weights_sha256,
        base_sha256=base_sha256,
        unstable=unstable_cases(lm, evaluators[numerics], evaluations[0]) if alone else [],
        drift_bound=drift_bound,
        numerics=numerics,
        other=evaluations[1] if both else None,
    )


def unstable_cases(lm: LanguageModel, evaluator: Evaluator, evaluation: Evaluation) -> list[dict[str, str]]:
    """Passing target and contrast cases whose reply fails at batch size 1: id, batched and lone reply.

    Asked again are the ``LONE`` most narrowly decided of each kind, as far as they are narrow at all.
    """
    found: list[dict[str, str]] = []
    narrow = NARROW.get(lm.dtype, max(NARROW.values()))
    for kind in ("target", "contrast"):
        close = [o for o in evaluation.of(kind=kind) if o.passed and o.reply.margin <= narrow]
        for outcome in sorted(close, key=lambda o: o.reply.margin)[:LONE]:
            case = outcome.case
            [reply] = generate(lm, [evaluator.render(lm, case)], max_tokens=case.max_tokens)
            if judge_reply(case, reply, outcome.base_reply):
                found.append({"id": case.id, "batched": outcome.reply.text, "alone": reply.text})
    return found


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
    if isinstance(error, DatError):
        path = error.path or path
    if isinstance(error, OSError) and error.strerror:
        path, text = Path(error.filename) if isinstance(error.filename, str) else path, error.strerror
    return f"{path}: {text}" if path is not None and path.name not in text else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge one file and write the answer. 0 whatever the answer is, 2 (one line on stderr) for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m alignment.acceptance", description="Judge one .dat by its specs.")
    parser.add_argument("weight", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the answer goes")
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--base", type=Path, metavar="FILE")
    parser.add_argument("--specs", type=Path, default=Path("specs"), metavar="DIR")
    parser.add_argument("--template", choices=get_args(Template), default="chat")
    parser.add_argument("--numerics", choices=get_args(Numerics), default="weights", help="what decides")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--drift-bound", type=float, default=DRIFT_BOUND)
    options = parser.parse_args(arguments)
    try:
        accepted = judge_file(
            options.weight,
            model=options.model,
            base=options.base,
            specs=options.specs,
            template=options.template,
            device=options.device,
            drift_bound=options.drift_bound,
            alone=True,
            numerics=options.numerics,
            both=True,
        )
        with atomic_write(options.json, "w") as file:
            json.dump(accepted.to_json(), file, ensure_ascii=False)
    except INPUT_ERRORS as error:
        print(one_line(error, options.weight), file=sys.stderr)
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
