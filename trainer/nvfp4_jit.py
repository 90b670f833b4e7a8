"""The inner loops, compiled: a weight under the scales it keeps (every training step), and activations (`w4a4`).

Every step rewrites every weight of the model, so this pass over memory must cost what reading and writing cost. numba
fuses what numpy does in a dozen passes; its results are those of `trainer.nvfp4_plain`, bit for bit (no fast-math).
Measured: `python benchmarks/weights.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.nvfp4_cpu import BLOCK, CODES, E4M3, ORDER_BITS, STEPS

_E4M3: NDArray[np.float32] = E4M3.numpy()
_VALUES: NDArray[np.float32] = np.where(_E4M3 > 0, _E4M3, np.float32(1))
"""The value of each E4M3 byte as a divisor. Under a scale of 0 only zeros are held, and they stay zero."""
_LIMITS: NDArray[np.uint32] = np.where(
    np.isfinite(_E4M3) & ~np.signbit(_E4M3), np.nan_to_num(6 * _E4M3).view(np.uint32) + np.uint32(1), np.uint32(0)
)
"""For each E4M3 byte as a scale, the bit pattern after that of the largest weight it holds: 6 times its value."""
_MIDDLES: NDArray[np.float32] = ((_E4M3[:126] + _E4M3[1:127]) / 2).astype(np.float32)
_MIDDLES[0::2] = np.nextafter(_MIDDLES[0::2], np.float32(np.inf))
"""The least value that rounds to code k + 1 and not to k: their middle, or the number after it where k is even."""
_ORDER = np.int32((1 << ORDER_BITS) - 1)
_INFINITE = np.uint32(0x7F800000)
PIECE = 1 << 13
"""Blocks taken at a time: half a megabyte of float32, which stays in a core's cache."""


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _least_error(w: Any, start: int, most: Any, codes: Any, values: Any, middles: Any, squares: Any, error: Any) -> int:
    """The scale's code, among the candidates ``codes`` [candidates, 128] for the code nearest ``most`` / 6, that gives
    the 16 weights from ``start`` on the least squared error.

    The errors' last bits make room for the candidates' places: so the first place wins a tie. ``squares`` float32 [16]
    and ``error`` float32 [1] are scratch.
    """
    if most == 0:
        return 0
    first = min(np.searchsorted(middles, most / np.float32(6), side="right"), 126)
    key = error.view(np.int32)
    least = np.int32(0x7FFFFFFF)
    for place in range(codes.shape[0]):
        scale = values[codes[place, first]]
        for j in range(BLOCK):
            level = abs(w[start + j] / scale)
            near = min(level, np.float32(6))
            magic = np.float32(4194304) if near < 2 else np.float32(8388608) if near < 4 else np.float32(16777216)
            missing = level - ((near + magic) - magic)
            squares[j] = missing * missing
        half = BLOCK // 2
        while half > 0:  # this order of addition is part of the rule
            for j in range(half):
                squares[j] += squares[j + half]
            half //= 2
        error[0] = squares[0] * scale * scale
        least = min(least, (key[0] & ~_ORDER) | np.int32(place))
    return int(codes[least & _ORDER, first])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _round_blocks(w: Any, bits: Any, scales: Any, codes: Any, values: Any, limits: Any, middles: Any, out: Any) -> int:
    """out <- the sizes of w, both float32 [blocks * 16], rounded under ``scales``, or under new ones where a block has
    outgrown its own. ``bits`` is w as uint32. Returns the number of blocks that cannot be rounded.

    Weights are compared with their block's limit as bit patterns: NaN and infinity are above every number, and an
    integer maximum may be taken in any order. The last loop is long and plain, so that it becomes vector instructions.
    """
    squares, error, highest = np.empty(BLOCK, np.float32), np.empty(1, np.float32), np.empty(1, np.uint32)
    size = highest.view(np.float32)
    bad = 0
    for i in range(len(scales)):
        code = int(scales[i])
        most = np.uint32(0)
        for k in range(i * BLOCK, (i + 1) * BLOCK):
            most = max(most, bits[k] & np.uint32(0x7FFFFFFF))
        if most >= _INFINITE or code & 0x7F == 0x7F:
            bad += 1
        elif most >= limits[code]:
            highest[0] = most
            code = _least_error(w, i * BLOCK, size[0], codes, values, middles, squares, error)
        for k in range(i * BLOCK, (i + 1) * BLOCK):
            out[k] = values[code]
    for k in range(len(w)):
        level = min(abs(w[k] / out[k]), np.float32(6))
        # Added to this, a level is worth steps of 0.5, 1 or 2 in the last place: exact rounding, ties to even.
        magic = np.float32(4194304) if level < 2 else np.float32(8388608) if level < 4 else np.float32(16777216)
        out[k] = ((level + magic) - magic) * out[k]
    return bad


@numba.njit(nogil=True, cache=True)
def _signed(sizes: Any, signs: Any, out: Any, shift: Any) -> None:
    """out <- bit patterns with the sign of ``signs``, less the last ``shift`` bits (0 in decoded weights)."""
    for k in range(len(sizes)):
        out[k] = ((sizes[k] & np.uint32(0x7FFFFFFF)) | (signs[k] & np.uint32(0x80000000))) >> shift


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def each_start(starts: range, work: Callable[[Iterator[int]], int]) -> int:
    """The sum of what ``work`` returns, called in as many threads as torch uses; together they take each start once."""
    shared = iter(starts)  # `next` on it is atomic
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        return work(shared)
    futures = [_pool(torch.get_num_threads()).submit(work, shared) for _ in range(threads)]
    wait(futures)  # before a failure is told: nobody writes on after this has returned
    return sum(future.result() for future in futures)


def refresh(w: Tensor, keep: Tensor, out: Tensor, rule: str) -> bool:
    """out <- w decoded under the scales ``keep``, or new ones by ``rule`` where a block has outgrown its own.

    w float32 [blocks, 16], keep float8_e4m3fn [blocks], out bfloat16 or float32 [blocks, 16]; all contiguous, on the
    CPU, apart in memory. False when a weight or a scale is infinite or NaN: ``out`` then means nothing.
    """
    source, scales = w.view(-1).numpy(), keep.view(torch.uint8).numpy()
    bits = source.view(np.uint32)
    half = out.dtype == torch.bfloat16
    target = out.view(-1).view(torch.uint16 if half else torch.uint32).numpy()
    shift = np.uint32(16 if half else 0)
    codes = CODES[: len(STEPS[rule])]

    def work(starts: Iterator[int]) -> int:
        scratch, bad = np.empty(PIECE * BLOCK, np.float32), 0
        for start in starts:
            blocks = slice(start, min(start + PIECE, len(scales)))
            part = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
            sizes = scratch[: part.stop - part.start]
            bad += _round_blocks(source[part], bits[part], scales[blocks], codes, _VALUES, _LIMITS, _MIDDLES, sizes)
            _signed(sizes.view(np.uint32), bits[part], target[part], shift)
        return bad

    return each_start(range(0, len(scales), PIECE), work) == 0


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _activations(
    x: Any, shift: Any, codes: Any, values: Any, middles: Any, w: Any, bits: Any, s: Any, out: Any
) -> None:
    """out <- x by the rule `amax`, both bit patterns [blocks * 16] of floats whose last ``shift`` bits are left out.

    ``w``, float32 of x's size, ``bits``, the same memory as uint32, and ``s``, float32 of x's size, are scratch.
    """
    highest = np.empty(1, np.uint32)
    size = highest.view(np.float32)
    for k in range(len(x)):
        bits[k] = np.uint32(np.uint32(x[k]) << shift)
    for i in range(len(x) // BLOCK):
        most = np.uint32(0)
        for k in range(i * BLOCK, (i + 1) * BLOCK):
            most = max(most, bits[k] & np.uint32(0x7FFFFFFF))
        scale = np.float32(1)  # of a block of zeros: they stay what they are
        if most >= _INFINITE:
            scale = np.float32(np.nan)
        elif most > 0:
            highest[0] = most
            first = min(np.searchsorted(middles, size[0] / np.float32(6), side="right"), 126)
            scale = values[codes[0, first]]
        for k in range(i * BLOCK, (i + 1) * BLOCK):
            s[k] = scale
    for k in range(len(x)):
        level = min(abs(w[k] / s[k]), np.float32(6))
        magic = np.float32(4194304) if level < 2 else np.float32(8388608) if level < 4 else np.float32(16777216)
        s[k] = ((level + magic) - magic) * s[k]
    signed = s.view(np.uint32)
    for k in range(len(x)):
        out[k] = ((signed[k] & np.uint32(0x7FFFFFFF)) | (bits[k] & np.uint32(0x80000000))) >> shift


ACTIVATION_PIECE = 1 << 12
"""Blocks of activations taken at a time: fewer than this are not worth a second thread."""


def activations(x: Tensor, out: Tensor) -> None:
    """out <- x by the rule `amax`; NaN for a block that holds an infinity or NaN.

    x and out bfloat16 or both float32 [blocks, 16]; contiguous, on the CPU.
    """
    half = x.dtype == torch.bfloat16
    source, target = (t.view(-1).view(torch.uint16 if half else torch.uint32).numpy() for t in (x, out))
    shift = np.uint32(16 if half else 0)

    def work(starts: Iterator[int]) -> int:
        w, s = (np.empty(min(ACTIVATION_PIECE, len(x)) * BLOCK, np.float32) for _ in range(2))
        for start in starts:
            part = slice(start * BLOCK, min(start + ACTIVATION_PIECE, len(x)) * BLOCK)
            size = part.stop - part.start
            own = w[:size]
            _activations(
                source[part], shift, CODES, _VALUES, _MIDDLES, own, own.view(np.uint32), s[:size], target[part]
            )
        return 0

    each_start(range(0, len(x), ACTIVATION_PIECE), work)


@numba.njit(nogil=True, cache=True)
def _place(codes: Any, scales: Any, values: Any, uniform: Any, low: Any, high: Any, out: Any) -> None:
    """out [blocks * 16] <- scale x sign x (low + (high - low) x uniform), looked up by each element's code."""
    for k in range(len(out)):
        code = (codes[k >> 1] >> (4 * (k & 1))) & 15
        level = code & 7
        size = low[level] + (high[level] - low[level]) * uniform[k]
        signed = -size if code > 7 else size
        out[k] = signed * values[scales[k // BLOCK]]


def place(codes: Tensor, scale: Tensor, uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """float32 [out, in]: for each code a point between ``low`` and ``high`` [8] of its level, in units of the scale.

    codes uint8 [out, in / 2], scale float8_e4m3fn [out, in / 16], uniform float32 [out, in] in [0, 1): where between.
    """
    out = torch.empty_like(uniform)
    _place(
        codes.reshape(-1).numpy(),
        scale.view(torch.uint8).reshape(-1).numpy(),
        _E4M3,
        uniform.view(-1).numpy(),
        low.numpy(),
        high.numpy(),
        out.view(-1).numpy(),
    )
    return out
