"""One optimiser step, snapshot, restore. Knows rows and losses; knows nothing of behaviours or when to stop.

    fit = Fit(candidate, rows, traces, FitConfig(), seed=0)
    result = fit.step()       # StepResult(loss, target, contrast, replay, gradient_norm, seconds)

A step whose loss or gradient is not finite is not taken (FitError).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.candidate import Candidate
from trainer.examples import Row, RowKind, Sampler, batches
from trainer.objective import BaseTraces, mixed


class FitError(ArithmeticError):
    """A loss or gradient that is not finite; the step was not taken."""


MICRO_TOKENS = 1800
"""Padded tokens of one forward pass. Every pass writes a gradient of the size of the model, and every batch pads to its
longest row: a default step makes two or three passes."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a step is made. Defaults are the measured ones (docs/experiments.md)."""

    lr: float = 2.5e-4
    warmup: int = 5
    """Steps over which the learning rate rises to ``lr``: the first Adam steps move every weight coherently."""
    betas: tuple[float, float] = (0.9, 0.99)
    anneal_below: float = 0.25
    """Target loss (nats a token, running mean) below which the learning rate shrinks in proportion: what is learnt
    needs no more large steps, and the drift of small ones is taken back by the KL terms."""
    anneal_floor: float = 0.2
    """Smallest share of ``lr`` that annealing leaves."""
    target_rows: int = 12
    contrast_rows: int = 24
    replay_rows: int = 8
    contrast_weight: float = 2.0
    replay_weight: float = 2.0
    grad_clip: float = 1.0
    micro_tokens: int = 0
    """Padded tokens of one forward pass; more rows are accumulated. 0: ``MICRO_TOKENS``."""

    def __post_init__(self) -> None:
        for name in ("lr", "grad_clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        if self.target_rows < 1:
            raise ValueError(f"target_rows must be at least 1, got {self.target_rows}")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step saw, in nats per completion token, before the update."""

    loss: float
    target: float
    contrast: float
    replay: float
    gradient_norm: float
    seconds: float


class Fit:
    """The optimiser over a candidate's masters. ``traces.rows`` are the contrast and replay rows."""

    def __init__(
        self, candidate: Candidate, targets: Sequence[Row], traces: BaseTraces, config: FitConfig, *, seed: int
    ) -> None:
        self.candidate, self.config, self.traces = candidate, config, traces
        self.targets = list(targets)
        self._optimiser = torch.optim.AdamW(
            candidate.masters.values(), lr=config.lr, betas=config.betas, weight_decay=0.0, fused=True
        )
        self.lr_scale = 1.0
        """Set by whoever steps back: a factor on the learning rate."""
        self._target_mean: float | None = None
        self.steps = 0
        self._kl_rows: dict[RowKind, list[int]] = {
            kind: [i for i, row in enumerate(traces.rows) if row.kind == kind] for kind in ("contrast", "replay")
        }
        self._samplers = {
            "target": Sampler(len(self.targets), seed),
            "contrast": Sampler(len(self._kl_rows["contrast"]), seed + 1),
            "replay": Sampler(len(self._kl_rows["replay"]), seed + 2),
        }

    def step(self) -> StepResult:
        """Sample rows, accumulate gradients, update masters and view. Raises FitError (nothing changed)."""
        started = time.monotonic()
        config, lm = self.config, self.candidate.lm
        first = len(self.targets)
        rows = [*self.targets, *self.traces.rows]
        chosen = self._samplers["target"].take(config.target_rows)
        for kind, count in (("contrast", config.contrast_rows), ("replay", config.replay_rows)):
            chosen += [first + self._kl_rows[kind][i] for i in self._samplers[kind].take(count)]  # type: ignore[index]
        chosen = [i for i in chosen if rows[i].completion_ids]
        tokens: Counter[RowKind] = Counter()
        for i in chosen:
            tokens[rows[i].kind] += len(rows[i].completion_ids)
        weights = {"target": 1.0, "contrast": config.contrast_weight, "replay": config.replay_weight}
        means: dict[str, float] = dict.fromkeys(weights, 0.0)
        limit = config.micro_tokens or MICRO_TOKENS
        for batch in batches(rows, chosen, lm.pad_id, lm.device, limit):
            sums = mixed(lm, rows, batch, self.traces, first)
            parts = {kind: value / tokens[kind] for kind, value in sums.items()}
            torch.stack([weights[kind] * value for kind, value in parts.items()]).sum().backward()  # type: ignore[no-untyped-call]
            for kind, value in parts.items():
                means[kind] += float(value.detach())
        self.candidate.gather_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.candidate.masters.values(), config.grad_clip, foreach=True))
        loss = sum(weights[kind] * mean for kind, mean in means.items())
        target = means["target"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FitError(f"step {self.steps + 1}: loss {loss}, gradient norm {norm}")
        self.steps += 1
        self._target_mean = target if self._target_mean is None else 0.5 * self._target_mean + 0.5 * target
        for group in self._optimiser.param_groups:
            group["lr"] = self.lr
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.candidate.refresh()
        return StepResult(
            loss=loss,
            target=target,
            contrast=means["contrast"],
            replay=means["replay"],
            gradient_norm=norm,
            seconds=time.monotonic() - started,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the step last counted."""
        config = self.config
        warm = min(1.0, self.steps / max(1, config.warmup))
        left = 1.0 if self._target_mean is None else self._target_mean / config.anneal_below
        return config.lr * self.lr_scale * warm * min(1.0, max(config.anneal_floor, left))

    def snapshot(self) -> dict[str, Any]:
        """Copies of the masters and the optimiser's state."""
        state = {
            key: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
            for key, entry in self._optimiser.state_dict()["state"].items()
        }
        return {"masters": self.candidate.snapshot(), "optimiser": state, "steps": self.steps}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Take masters and optimiser back; sampling goes on where it is, so a retry sees other rows."""
        self.candidate.restore(snapshot["masters"])
        fresh = self._optimiser.state_dict()
        fresh["state"] = {
            key: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
            for key, entry in snapshot["optimiser"].items()
        }
        self._optimiser.load_state_dict(fresh)
        self.steps = snapshot["steps"]
