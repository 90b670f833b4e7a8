"""What a run leaves behind, as plain data: the report, the manifest and the exit code are made from it alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.evaluate import Evaluation
from alignment.gate import Assessment, Verdict
from trainer.numerics import Numerics


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step. Losses and KLs in nats per completion token, before the update."""

    step: int
    loss: float
    target: float
    contrast: float
    replay: float
    gradient_norm: float
    lr: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One evaluation of the candidate on anchor and dev cases."""

    step: int
    drift: float
    green: bool
    decision: str
    """``go-on``, ``green`` or ``step-back``."""
    passed: dict[str, tuple[int, int]]
    """Spec name to (cases in order, cases): a general or preserve case is in order unless the base's answer is lost."""
    reasons: tuple[str, ...]
    seconds: float


@dataclass(kw_only=True)
class RunRecord:
    """Everything a report says."""

    run: str
    """Name of the run's folder under reports/."""
    verdict: Verdict
    cause: str
    """One sentence: why the run ended with this verdict."""
    command: str
    started: str
    """ISO 8601, UTC."""
    base: dict[str, Any]
    """name, path, sha256, folder, folder_sha256."""
    artifact: dict[str, Any] | None
    """path, sha256, bytes; None when nothing was exported."""
    inputs: dict[str, str]
    """File or folder to SHA-256: data files, the spec suite."""
    config: dict[str, Any]
    environment: dict[str, Any]
    code: dict[str, Any]
    """revision and dirty, or version only."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock per phase."""
    peak_rss_bytes: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)
    final: Evaluation | None = None
    """All splits, from the acceptance in a fresh process (else the last evaluation of the candidate)."""
    assessment: Assessment | None = None
    accepted_in_fresh_process: bool = False
    unstable: list[dict[str, str]] = field(default_factory=list)
    """Passing cases whose reply failed at batch size 1: id, batched, alone."""
    other: Evaluation | None = None
    """All splits of the same file in the numerics that did not decide (``trainer.numerics.other``)."""
    tensors: list[dict[str, Any]] = field(default_factory=list)
    """As trainer.dat_diff.Group.to_json, with ``trained``."""

    @property
    def numerics(self) -> Numerics:
        """The numerics that decided."""
        return "w4a4" if self.config.get("numerics") == "w4a4" else "weights"

    def plain(self) -> dict[str, Any]:
        """JSON-ready data without the bulky evaluations; cases are added by the report."""
        keep = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("final", "assessment", "other")
        }
        return _plain(keep)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return value
