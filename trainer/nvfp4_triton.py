"""The fast NVFP4 path for CUDA devices: bound by memory, and without waiting.

Promises: the results of the plain path in `trainer.nvfp4_plain`, bit for bit. Why it looks as it does:

- The sum over a block's squared errors is part of the rule, its order included, and a compiler's own reduction has an
  order of its choosing: so a thread has a block, sixteen numbers, and the sum is written out. (Splitting a tile of
  blocks into its columns did the same five times slower: docs/experiments.md, 12.)
- So scales are settled in one pass and weights rounded in a second one, where a thread has part of a block and memory
  is read in its order.
- Nothing may be contracted to a fused multiply-add behind our back: `enable_fp_fusion=False`. The seven divisions of
  the search are by hand: multiply by the reciprocal, then correct once with the exact remainder (P. Markstein, IBM
  Journal of Research and Development 34, 1990). For divisors of four significant bits that is the IEEE quotient; a
  test compares all of them.
- Nothing waits for the device: what cannot be rounded raises a flag in memory, and the caller looks when it wants to.

Triton comes with the CUDA builds of torch; without it, `available` says no and the plain path does the work.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.nvfp4_cpu import ORDER_BITS, STEPS

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover - the CPU builds of torch come without it
    if not TYPE_CHECKING:
        triton = None

_ROWS = 128
"""Blocks in a program: 2,048 weights, 16 a thread. Measured on one H100: docs/experiments.md, 12."""


@functools.cache
def available() -> bool:
    """Whether tensors on a CUDA device can come this way."""
    return triton is not None and torch.cuda.is_available() and torch.version.hip is None


def fake(blocks: Tensor, keep: Tensor | None, out: Tensor, rule: str, bad: Tensor) -> None:
    """out <- the rounded values of ``blocks``, both [blocks, 16] of any float type; ``keep`` float8_e4m3fn [blocks].

    ``bad`` int32 [1] becomes 1 where a block holds an infinity or NaN (its values are then NaN) or a kept scale is NaN.
    """
    scale = torch.empty(blocks.shape[0], dtype=torch.float8_e4m3fn, device=blocks.device)
    _settle(blocks, keep, scale, rule, bad)
    _launch(_fake_kernel, blocks, scale.view(torch.uint8), out)


def encode(blocks: Tensor, keep: Tensor | None, qdata: Tensor, scale: Tensor, rule: str, bad: Tensor) -> None:
    """qdata uint8 [blocks, 8] <- the codes of ``blocks`` [blocks, 16], scale float8_e4m3fn [blocks] <- their scales.

    ``keep`` and ``bad`` as in `fake`.
    """
    _settle(blocks, keep, scale, rule, bad)
    encode_under(blocks, scale, qdata, bad)


def encode_under(blocks: Tensor, scale: Tensor, qdata: Tensor, bad: Tensor) -> None:
    """qdata uint8 [blocks, 8] <- the codes of ``blocks`` under the scales (E4M3, float16 or float32) as they are."""
    byte = scale.dtype == torch.float8_e4m3fn
    given = scale.view(torch.uint8) if byte else scale
    _launch(_encode_kernel, blocks, given, qdata.view(torch.int32), bad, BYTE=byte)


def decode(qdata: Tensor, scale: Tensor, out: Tensor, bad: Tensor) -> None:
    """out [blocks, 16] <- the values of codes uint8 [blocks, 8] under scales [blocks] (E4M3, float16 or float32)."""
    byte = scale.dtype == torch.float8_e4m3fn
    _launch(_decode_kernel, qdata, scale.view(torch.uint8) if byte else scale, out, bad, BYTE=byte)


def _settle(blocks: Tensor, keep: Tensor | None, scale: Tensor, rule: str, bad: Tensor) -> None:
    given = blocks if keep is None else keep.view(torch.uint8)
    _launch(_settle_kernel, blocks, given, scale.view(torch.uint8), bad, KEEP=keep is not None, MSE=rule == "mse")


def _launch(kernel: Any, blocks: Tensor, *rest: Tensor, **constants: bool) -> None:
    count = blocks.shape[0]
    with torch.cuda.device(blocks.device):
        kernel[(triton.cdiv(count, _ROWS),)](
            blocks, *rest, count, **constants, ROWS=_ROWS, num_warps=4, enable_fp_fusion=False
        )


if triton is not None:
    _PLACES = tl.constexpr(len(STEPS["mse"]))
    _PLACE_MASK = tl.constexpr((1 << ORDER_BITS) - 1)
    _INFINITE = tl.constexpr(0x7F800000)

    @triton.jit
    def _value(code):  # type: ignore[no-untyped-def]
        """The value, float32, of E4M3 bytes as int32; of NaN, 480."""
        size = code & 0x7F
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        return (value.to(tl.int32, bitcast=True) | ((code >> 7) << 31)).to(tl.float32, bitcast=True)

    @triton.jit
    def _nearest_code(x):  # type: ignore[no-untyped-def]
        """The E4M3 code, int32, nearest to x >= 0; ties to even; at most 448, code 126."""
        x = tl.minimum(x, 448.0)
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = ((x * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)
        return tl.where(x < 0.015625, small, normal)

    @triton.jit
    def _round(y):  # type: ignore[no-untyped-def]
        """The nearest level, ties to the even code; y >= 0. As in `trainer.nvfp4_plain`."""
        y = tl.minimum(y, 6.0)
        power = (tl.maximum(y, 1.0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        # A sum as large as 2^22 times the power of two below y counts in steps of half that power; the products are
        # exact, so that nothing is rounded but the sum.
        return tl.fma(power, -4194304.0, tl.fma(power, 4194304.0, y))

    @triton.jit
    def _quotient(a, s, r):  # type: ignore[no-untyped-def]
        """a / s to nearest, where s is the value of an E4M3 code from 1 to 126 and r is 1 / s to nearest."""
        q = a * r
        return tl.fma(tl.fma(-q, s, a), r, q)

    @triton.jit
    def _quotients(a, scale):  # type: ignore[no-untyped-def]
        """The magnitudes a [rows, 16] of blocks divided by their scales, 0 where that is 0 (of either sign)."""
        s = tl.where(scale == 0.0, 1.0, scale)
        r = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, s))
        return _quotient(a, s[:, None], r[:, None])

    @triton.jit
    def _square(a, s, r):  # type: ignore[no-untyped-def]
        """(a / s - its level)^2; s and r as in `_quotient`."""
        q = _quotient(a, s, r)
        d = q - _round(q)
        return d * d

    @triton.jit
    def _error(  # type: ignore[no-untyped-def]
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, s
    ):  # fmt: skip
        """The squared error of a block under scale s; this order of addition is part of the rule."""
        r = tl.div_rn(1.0, s)
        x0 = _square(a0, s, r) + _square(a8, s, r)
        x1 = _square(a1, s, r) + _square(a9, s, r)
        x2 = _square(a2, s, r) + _square(a10, s, r)
        x3 = _square(a3, s, r) + _square(a11, s, r)
        x4 = _square(a4, s, r) + _square(a12, s, r)
        x5 = _square(a5, s, r) + _square(a13, s, r)
        x6 = _square(a6, s, r) + _square(a14, s, r)
        x7 = _square(a7, s, r) + _square(a15, s, r)
        return (((x0 + x4) + (x2 + x6)) + ((x1 + x5) + (x3 + x7))) * s * s

    @triton.jit
    def _step(place):  # type: ignore[no-untyped-def]
        """`STEPS["mse"][place]`."""
        return tl.where(place == 0, 0, tl.where(place == 1, -1, place - 1))

    @triton.jit
    def _best(  # type: ignore[no-untyped-def]
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
        first, ROWS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """The code with the least error among the candidates around ``first``, int32 [ROWS]."""
        least = tl.full((ROWS,), 0x7FFFFFFF, tl.int32)
        for place in range(_PLACES):  # unrolled, it is compiled for four seconds instead of one
            s = _value(tl.minimum(tl.maximum(first + _step(place), 1), 126))
            error = _error(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, s)
            least = tl.minimum(least, (error.to(tl.int32, bitcast=True) & ~_PLACE_MASK) | place)
        place = least & _PLACE_MASK
        return tl.minimum(tl.maximum(first + _step(place), 1), 126)

    @triton.jit
    def _size(src, row, there, column):  # type: ignore[no-untyped-def]
        """The magnitude of one column of the blocks, float32 [rows]."""
        return tl.abs(tl.load(src + row * 16 + column, mask=there, other=0.0).to(tl.float32))

    @triton.jit
    def _bits(a):  # type: ignore[no-untyped-def]
        """A magnitude as an integer: in the same order, and above every number are infinity and NaN."""
        return a.to(tl.int32, bitcast=True)

    @triton.jit
    def _settle_kernel(  # type: ignore[no-untyped-def]
        src, given, scales, bad, count, KEEP: tl.constexpr, MSE: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """The scales of blocks: new ones, or the kept ones except where outgrown. One thread has one block."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = row < count
        a0 = _size(src, row, there, 0)
        a1 = _size(src, row, there, 1)
        a2 = _size(src, row, there, 2)
        a3 = _size(src, row, there, 3)
        a4 = _size(src, row, there, 4)
        a5 = _size(src, row, there, 5)
        a6 = _size(src, row, there, 6)
        a7 = _size(src, row, there, 7)
        a8 = _size(src, row, there, 8)
        a9 = _size(src, row, there, 9)
        a10 = _size(src, row, there, 10)
        a11 = _size(src, row, there, 11)
        a12 = _size(src, row, there, 12)
        a13 = _size(src, row, there, 13)
        a14 = _size(src, row, there, 14)
        a15 = _size(src, row, there, 15)
        top0 = tl.maximum(tl.maximum(_bits(a0), _bits(a1)), tl.maximum(_bits(a2), _bits(a3)))
        top1 = tl.maximum(tl.maximum(_bits(a4), _bits(a5)), tl.maximum(_bits(a6), _bits(a7)))
        top2 = tl.maximum(tl.maximum(_bits(a8), _bits(a9)), tl.maximum(_bits(a10), _bits(a11)))
        top3 = tl.maximum(tl.maximum(_bits(a12), _bits(a13)), tl.maximum(_bits(a14), _bits(a15)))
        top = tl.maximum(tl.maximum(top0, top1), tl.maximum(top2, top3))
        most = top.to(tl.float32, bitcast=True)
        first = _nearest_code(tl.div_rn(most, 6.0))
        code = tl.minimum(tl.maximum(first, 1), 126)
        if KEEP:
            kept = tl.load(given + row, mask=there, other=0).to(tl.int32)
            fits = (most <= 6.0 * _value(kept)) & (top < _INFINITE)
            fits = fits | ((kept & 0x7F) == 0x7F)  # a broken scale is told, not replaced
            search = tl.min(fits.to(tl.int32), axis=0) == 0
        else:
            search = tl.max(top, axis=0) > 0
        if MSE and search:
            code = _best(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, first, ROWS)
        code = tl.where(top > 0, code, 0)
        code = tl.where(top < _INFINITE, code, 0x7F)
        if KEEP:
            code = tl.where(fits, kept, code)
        _tell((code & 0x7F) == 0x7F, bad)
        tl.store(scales + row, code.to(tl.uint8), mask=there)

    @triton.jit
    def _tell(wrong, bad):  # type: ignore[no-untyped-def]
        """Raise the flag when any row is wrong. Every writer writes the same number: no atomic is needed."""
        if tl.max(wrong.to(tl.int32), axis=0) > 0:
            tl.store(bad, 1)

    @triton.jit
    def _fake_kernel(src, scales, out, count, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """The rounded values under settled scales; NaN under a scale that is NaN."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = row < count
        place = row[:, None] * 16 + tl.arange(0, 16)[None, :]
        w = tl.load(src + place, mask=there[:, None], other=0.0).to(tl.float32)
        code = tl.load(scales + row, mask=there, other=0).to(tl.int32)
        scale = _value(code)
        value = tl.abs(_round(_quotients(tl.abs(w), scale)) * scale[:, None])
        sign = w.to(tl.int32, bitcast=True) & (-0x80000000)
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        value = tl.where(((code & 0x7F) == 0x7F)[:, None], float("nan"), value)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=there[:, None])

    @triton.jit
    def _encode_kernel(src, given, codes, bad, count, BYTE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """The codes, eight a word, under scales as they are."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = row < count
        w = tl.load(src + row[:, None] * 16 + tl.arange(0, 16)[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        scale, wrong = _load_scale(given, row, there, BYTE)
        size = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        _tell(wrong | (tl.max(size, axis=1) >= _INFINITE), bad)
        s = scale[:, None]
        y = tl.div_rn(w, tl.where(s == 0.0, float("inf"), s))
        level = _round(tl.abs(y))
        index = tl.where(level < 1.0, (level * 2.0).to(tl.int32), (level.to(tl.int32, bitcast=True) >> 22) - 252)
        nibble = index | ((y.to(tl.int32, bitcast=True) >> 28) & 8)
        nibble = nibble << ((tl.arange(0, 16) % 8) * 4)[None, :]
        word = tl.sum(tl.reshape(nibble, (ROWS, 2, 8)), axis=2)
        tl.store(codes + row[:, None] * 2 + tl.arange(0, 2)[None, :], word, mask=there[:, None])

    @triton.jit
    def _load_scale(given, row, there, BYTE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """Scales as float32, and whether each is infinite or NaN."""
        if BYTE:
            byte = tl.load(given + row, mask=there, other=0).to(tl.int32)
            scale = _value(byte)
            wrong = (byte & 0x7F) == 0x7F
        else:
            scale = tl.load(given + row, mask=there, other=0.0).to(tl.float32)
            wrong = (scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= _INFINITE
        return scale, wrong

    @triton.jit
    def _level(nibble):  # type: ignore[no-untyped-def]
        """The level, float32, of codes as int32."""
        index = nibble & 7
        size = tl.where(index < 2, index.to(tl.float32) * 0.5, ((index + 252) << 22).to(tl.float32, bitcast=True))
        return (size.to(tl.int32, bitcast=True) | ((nibble >> 3) << 31)).to(tl.float32, bitcast=True)

    @triton.jit
    def _decode_kernel(codes, scales, out, bad, count, BYTE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = row < count
        scale, wrong = _load_scale(scales, row, there, BYTE)
        _tell(wrong, bad)
        byte = tl.load(codes + row[:, None] * 8 + tl.arange(0, 8)[None, :], mask=there[:, None], other=0).to(tl.int32)
        s = scale[:, None]
        low = (_level(byte & 15) * s).to(out.dtype.element_ty)
        high = (_level(byte >> 4) * s).to(out.dtype.element_ty)
        value = tl.reshape(tl.join(low, high), (ROWS, 16))
        tl.store(out + row[:, None] * 16 + tl.arange(0, 16)[None, :], value, mask=there[:, None])
