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
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.candidate import Candidate
from trainer.examples import Row, RowKind, Sampler, batches
from trainer.objective import BaseTraces, weighted_losses
from trainer.optimiser import Optimiser


class FitError(ArithmeticError):
    """A loss or gradient that is not finite; the step was not taken."""


MICRO_TOKENS = 4096
"""Tokens of one forward pass. Every pass writes a gradient of the size of the model: a default step makes one."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a step is made. Defaults are the measured ones (docs/experiments.md)."""

    lr: float = 5e-4
    warmup: int = 5
    """Steps over which the learning rate rises to ``lr``: the first Adam steps move every weight coherently."""
    betas: tuple[float, float] = (0.5, 0.99)
    """A short memory of the gradient: the running mean of the weights smooths already, and at one learning rate less
    momentum drifts less and tells near misses apart better."""
    decay_from: float = 0.2
    decay_to: float = 0.6
    """Shares of the planned steps between which the learning rate falls in a straight line: at their beginning the
    targets are learnt, and what is left is to tell near misses apart and to take drift back."""
    lr_floor: float = 0.15
    """Share of ``lr`` that is left from then on."""
    target_rows: int = 12
    contrast_rows: int = 22
    replay_rows: int = 8
    contrast_weight: float = 3.0
    replay_weight: float = 6.0
    hard: dict[RowKind, float] = field(default_factory=lambda: {"target": 2.0, "contrast": 0.3, "replay": 1.5})
    """A row whose loss (sum over its completion, nats) was above this when last seen is asked again soon."""
    again: float = 0.8
    """Most of a step's rows of a kind that are taken from those."""
    average: float = 0.9
    """What is evaluated and shipped is a running mean of the masters; this is the share that a step leaves of it. The
    mean forgets the noise of single steps, which the drift is mostly made of."""
    grad_clip: float = 1.0
    micro_tokens: int = 0
    """Tokens of one forward pass; more rows are accumulated. 0: ``MICRO_TOKENS``."""

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
        self,
        candidate: Candidate,
        targets: Sequence[Row],
        traces: BaseTraces,
        config: FitConfig,
        *,
        seed: int,
        planned: int = 80,
    ) -> None:
        """``planned``: the steps that the learning rate's schedule is laid out for."""
        self.candidate, self.config, self.traces = candidate, config, traces
        self.targets = list(targets)
        self._optimiser = Optimiser(candidate, betas=config.betas, average=config.average)
        self.lr_scale = 1.0
        """Set by whoever steps back: a factor on the learning rate."""
        self._planned = planned
        self.steps = self._warm_from = 0
        self.rows = [*self.targets, *traces.rows]
        self._counts: dict[RowKind, int] = {
            "target": config.target_rows,
            "contrast": config.contrast_rows,
            "replay": config.replay_rows,
        }
        self._rows: dict[RowKind, list[int]] = {
            kind: [i for i, row in enumerate(self.rows) if row.kind == kind and row.completion_ids]
            for kind in self._counts
        }
        self._place = {i: place for indices in self._rows.values() for place, i in enumerate(indices)}
        self._samplers = {
            kind: Sampler(len(indices), seed + number, hard=config.hard[kind], again=config.again)
            for number, (kind, indices) in enumerate(self._rows.items())
        }

    def sample(self) -> list[int]:
        """The next rows: indices of ``rows``."""
        return [
            self._rows[kind][place]
            for kind, count in self._counts.items()
            for place in self._samplers[kind].take(count)
        ]

    def step(self) -> StepResult:
        """Sample rows, accumulate gradients, update masters and view. Raises FitError: no weight changed, and the
        next step sees other rows."""
        started = time.monotonic()
        config, lm = self.config, self.candidate.lm
        first, rows = len(self.targets), self.rows
        chosen = self.sample()
        tokens: Counter[RowKind] = Counter()
        for i in chosen:
            tokens[rows[i].kind] += len(rows[i].completion_ids)
        weights = {"target": 1.0, "contrast": config.contrast_weight, "replay": config.replay_weight}
        means: dict[str, float] = dict.fromkeys(weights, 0.0)
        seen: list[tuple[int, float]] = []
        for batch in batches(rows, chosen, lm.device, config.micro_tokens or MICRO_TOKENS):
            kinds = [rows[i].kind for i in batch.rows]
            shares = [weights[kind] / tokens[kind] for kind in kinds]
            total, losses = weighted_losses(lm, rows, batch, self.traces, first, shares)
            total.backward()  # type: ignore[no-untyped-call]
            for i, kind, loss in zip(batch.rows, kinds, losses.tolist(), strict=True):
                means[kind] += loss / tokens[kind]
                seen.append((i, loss))
        norm = self._optimiser.gradient_norm()
        loss = sum(weights[kind] * mean for kind, mean in means.items())
        target = means["target"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.candidate.drop_gradients()
            raise FitError(f"step {self.steps + 1}: loss {loss}, gradient norm {norm}")
        for i, value in seen:
            self._samplers[rows[i].kind].learnt(self._place[i], value)
        self.steps += 1
        self._optimiser.step(lr=self.lr, scale=min(1.0, config.grad_clip / (norm + 1e-6)))
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
    def until_settled(self) -> int:
        """Steps until the learning rate has come down to its floor; 0 from then on."""
        return max(0, math.ceil(self.config.decay_to * self._planned) - self.steps)

    @property
    def settled(self) -> bool:
        """Whether the learning rate is down at its floor: what passes then was not caught in passing."""
        return self.until_settled == 0

    @property
    def lr(self) -> float:
        """The learning rate of the step last counted."""
        config = self.config
        warm = min(1.0, (self.steps - self._warm_from) / max(1, config.warmup))
        first, last = config.decay_from * self._planned, config.decay_to * self._planned
        left = 1 - (self.steps - first) / max(1.0, last - first)
        return config.lr * self.lr_scale * warm * min(1.0, max(config.lr_floor, left))

    @torch.no_grad()
    def swap_average(self) -> None:
        """Let masters and their running mean change places, the view with them; twice is as before."""
        for name, mean in self._optimiser.mean.items():
            master = self.candidate.masters[name]
            master.data, self._optimiser.mean[name] = mean, master.data
        self.candidate.refresh()

    def snapshot(self) -> dict[str, Any]:
        """The weights as they would ship, and the number of steps. The optimiser's moments are left out: they point to
        where a run that is stepped back must not go."""
        return {"weights": self.candidate.snapshot(), "steps": self.steps}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Take the weights back and begin with fresh moments, warming up again; sampling goes on where it is, so that a
        retry sees other rows."""
        self.candidate.restore(snapshot["weights"])
        self._optimiser.reset()
        self.steps = self._warm_from = snapshot["steps"]
