"""AdamW and the running mean of what it trains, for float32 masters behind a quantised view.

    optimiser = Optimiser(candidate, betas=(0.5, 0.99), average=0.9)
    norm = optimiser.gradient_norm()          # of what backward left on the view
    optimiser.step(lr=1e-3, scale=min(1.0, 1.0 / norm))

AdamW as Loshchilov and Hutter (arXiv 1711.05101) without weight decay, in float32. On a CPU one compiled pass over the
weights reads the view's gradient as it is, and writes moments, master and mean: what torch's optimiser, a copy of the
gradient in float32, clipping and the mean do in five passes. Elsewhere torch's own fused AdamW does it. The two agree
within rounding (tests/trainer/test_optimiser.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from trainer.candidate import Candidate
from trainer.nvfp4_jit import each_start

EPS = 1e-8
PIECE = 1 << 16
"""Weights taken at a time: a piece of all six arrays fits a core's cache."""


class Optimiser:
    """Moments and running mean of a candidate's masters. What has no gradient is left alone."""

    def __init__(self, candidate: Candidate, *, betas: tuple[float, float], average: float) -> None:
        """``average``: the share of the running mean that a step leaves of it."""
        self._candidate, self._betas, self._share = candidate, betas, average
        self._fast = candidate.lm.device.type == "cpu"
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps = 0
        self.mean: dict[str, Tensor] = {}
        """The running mean of each master, as large as it; empty before the first step."""
        self._torch = self._make()

    def _make(self) -> torch.optim.Optimizer | None:
        if self._fast:
            return None
        return torch.optim.AdamW(
            self._candidate.masters.values(), lr=0.0, betas=self._betas, eps=EPS, weight_decay=0.0, fused=True
        )

    def reset(self) -> None:
        """Forget moments and mean."""
        self._moments, self.mean, self._steps, self._torch = {}, {}, 0, self._make()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """The 2-norm of all gradients of the view; NaN or infinite when one of them is."""
        gradients = [p.grad for p in self._candidate.parameters.values() if p.grad is not None]
        if self._fast:
            return math.sqrt(sum(map(_sum_of_squares, gradients)))
        norms = torch._foreach_norm([gradient.float() for gradient in gradients])
        return float(torch.stack(norms).norm())

    @torch.no_grad()
    def step(self, *, lr: float, scale: float) -> None:
        """One update from the view's gradients times ``scale``; the gradients are freed."""
        self._steps += 1
        masters = self._candidate.masters
        begin = not self.mean
        if begin:
            # Finite numbers, since the first share of 0 would not keep a NaN of fresh memory out.
            self.mean = {name: torch.zeros_like(master) for name, master in masters.items()}
        share = 0.0 if begin else self._share
        if self._torch is None:
            first, second = self._betas
            # Both corrections for the moments' start at zero, moved out of the loop over the weights.
            root = math.sqrt(1 - second**self._steps)
            rate = lr * root / (1 - first**self._steps)
            numbers = np.array([first, second, rate, EPS * root, scale, share], np.float32)
            for name, master in masters.items():
                self._update(name, master.detach(), self._candidate.parameters[name], numbers)
            return
        self._candidate.gather_gradients()
        for group in self._torch.param_groups:
            group["lr"] = lr
        torch._foreach_mul_([m.grad for m in masters.values() if m.grad is not None], scale)
        self._torch.step()
        means, values = list(self.mean.values()), [master.detach() for master in masters.values()]
        torch._foreach_lerp_(means, values, 1 - share) if share else torch._foreach_copy_(means, values)

    def _update(self, name: str, master: Tensor, view: torch.nn.Parameter, numbers: Any) -> None:
        mean = self.mean[name]
        if view.grad is None:
            mean.lerp_(master, 1 - float(numbers[5]))
            return
        if name not in self._moments:
            self._moments[name] = torch.zeros_like(master), torch.zeros_like(master)
        first, second, weights, average = (t.reshape(-1).numpy() for t in (*self._moments[name], master, mean))
        raw, shift = _raw(view.grad)

        def work(starts: Iterator[int]) -> int:
            bits = np.empty(PIECE, np.uint32)
            for start in starts:
                part = slice(start, min(start + PIECE, len(raw)))
                piece = bits[: part.stop - part.start]
                _widen(raw[part], piece, shift)
                _adam(piece.view(np.float32), (first[part], second[part], weights[part], average[part]), numbers)
            return 0

        each_start(range(0, len(raw), PIECE), work)
        view.grad = None


def _raw(gradient: Tensor) -> tuple[Any, np.uint32]:
    """The bits of a bfloat16 or float32 tensor, and how far they are shifted to become those of a float32."""
    if gradient.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"a gradient of {gradient.dtype}, not bfloat16 or float32")
    half = gradient.dtype == torch.bfloat16
    return gradient.reshape(-1).view(torch.uint16 if half else torch.uint32).numpy(), np.uint32(16 if half else 0)


def _sum_of_squares(gradient: Tensor) -> float:
    raw, shift = _raw(gradient)
    starts = range(0, len(raw), PIECE)
    sums = np.zeros(len(starts))  # added in their order, whichever thread was first

    def work(taken: Iterator[int]) -> int:
        bits = np.empty(PIECE, np.uint32)
        for start in taken:
            part = raw[start : start + PIECE]
            piece = bits[: len(part)]
            _widen(part, piece, shift)
            sums[start // PIECE] = _squares(piece.view(np.float32))
        return 0

    each_start(starts, work)
    return float(sums.sum())


@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})  # so that the sum becomes vector instructions
def _squares(values: Any) -> float:
    total = np.float32(0)
    for k in range(len(values)):
        total += values[k] * values[k]
    return float(total)


@numba.njit(nogil=True, cache=True)
def _widen(raw: Any, bits: Any, shift: Any) -> None:
    for k in range(len(bits)):
        bits[k] = np.uint32(raw[k]) << shift


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _adam(gradient: Any, arrays: Any, numbers: Any) -> None:
    first, second, master, mean = arrays
    one = np.float32(1)
    b1, b2, rate, eps, scale, share = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]
    for k in range(len(gradient)):
        g = gradient[k] * scale
        m = b1 * first[k] + (one - b1) * g
        v = b2 * second[k] + (one - b2) * g * g
        w = master[k] - rate * m / (np.sqrt(v) + eps)
        first[k] = m
        second[k] = v
        master[k] = w
        mean[k] = w + share * (mean[k] - w)
