"""What ``align run`` was asked for, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from alignment.gate import DRIFT_BOUND
from trainer.fit import FitConfig
from trainer.model import Template
from trainer.numerics import Numerics
from trainer.nvfp4 import Rule


class RunError(Exception):
    """A run that cannot start; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What ``align run`` was asked for."""

    base: Path
    """A model folder, or a .dat inside one."""
    out: Path
    specs: Path = Path("specs")
    data: Path = Path("data")
    reports: Path = Path("reports")
    seed: int = 0
    steps: int = 330
    """Most optimiser steps (the budget)."""
    eval_every: int = 66
    budget_minutes: float = 30.0
    until_green: bool = True
    """Stop when green with the learning rate down; otherwise train all steps and judge then."""
    template: Template = "chat"
    device: str = "auto"
    drift_bound: float = DRIFT_BOUND
    retries: int = 3
    """How often the run steps back before it ends with ``regressed``."""
    rule: Rule = "mse"
    numerics: Numerics = "weights"
    """Of training and of every evaluation, the base's too. The artifact is judged by it, and looked at in the other."""
    dither: float = 0.5
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if self.out.suffix != ".dat":
            raise RunError(f"--out {self.out}: an artifact's name ends in .dat")
        if self.numerics not in get_args(Numerics):
            raise RunError(f"--numerics {self.numerics}: choose {' or '.join(get_args(Numerics))}")
        for name in ("steps", "eval_every"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.budget_minutes) and self.budget_minutes > 0):
            raise RunError(f"--budget-minutes must be above 0, got {self.budget_minutes}")

    @property
    def base_file(self) -> Path:
        return self.base if self.base.suffix == ".dat" else self.base / "base.dat"


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON-ready data."""
    flat = dataclasses.asdict(config)
    return json.loads(json.dumps(flat, default=str))  # type: ignore[no-any-return]


def refuse_overwriting(config: RunConfig) -> None:
    """A base or a pinned artifact is never overwritten."""
    if not config.out.exists():
        return
    if config.out.samefile(config.base_file):
        raise RunError(f"--out {config.out} is the base itself; choose another name")
    beside = config.out.with_name(config.out.name + ".json")
    try:
        kept = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(
            f"--out {config.out} exists and was not made by align (no readable {beside.name}); move it away"
        ) from None
    if not isinstance(kept, dict) or kept.get("kind") == "base" or kept.get("pinned"):
        raise RunError(f"--out {config.out} is a base or pinned; choose another name")
