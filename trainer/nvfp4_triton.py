"""The fast NVFP4 path for CUDA devices: every weight is read once and written once.

Promises: the results of the plain path in `trainer.nvfp4_plain`, bit for bit. Why it looks as it does:

- The sum over a block's squared errors is part of the rule, its order included, and a compiler's own reduction has an
  order of its choosing: so a block is split into sixteen vectors, and the sum is written out.
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
"""Blocks in a program: 2,048 weights, 16 a thread. Measured on one H100: docs/experiments.md, 11."""
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@functools.cache
def available() -> bool:
    """Whether tensors on a CUDA device can come this way."""
    return triton is not None and torch.cuda.is_available() and torch.version.hip is None


def fake(blocks: Tensor, keep: Tensor | None, out: Tensor, rule: str, bad: Tensor) -> None:
    """out <- the rounded values of ``blocks``, both [blocks, 16] of any float type; ``keep`` float8_e4m3fn [blocks].

    ``bad`` int32 [1] becomes 1 where a block holds an infinity or NaN (its values are then NaN) or a kept scale is NaN.
    """
    count = blocks.shape[0]
    with torch.cuda.device(blocks.device):
        _fake[(triton.cdiv(count, _ROWS),)](
            blocks, blocks if keep is None else keep.view(torch.uint8), out, bad, count,
            KEEP=keep is not None, MSE=rule == "mse", ROWS=_ROWS, **_OPTIONS,
        )  # fmt: skip


def encode(blocks: Tensor, given: Tensor | None, qdata: Tensor, scale: Tensor | None, rule: str, bad: Tensor) -> None:
    """qdata uint8 [blocks, 8] <- the codes of ``blocks`` [blocks, 16], and scale float8_e4m3fn [blocks] <- theirs.

    ``given``: the scales to keep where they suffice, or, without a ``scale`` to fill, those to use as they are (E4M3,
    float16 or float32). ``bad`` as in `fake`.
    """
    count = blocks.shape[0]
    byte = given is not None and given.dtype == torch.float8_e4m3fn
    source = blocks if given is None else given.view(torch.uint8) if byte else given
    with torch.cuda.device(blocks.device):
        _encode[(triton.cdiv(count, _ROWS),)](
            blocks, source, qdata.view(torch.int32), qdata if scale is None else scale.view(torch.uint8), bad, count,
            GIVEN=given is not None, BYTE=byte, FIXED=scale is None, MSE=rule == "mse", ROWS=_ROWS, **_OPTIONS,
        )  # fmt: skip


def decode(qdata: Tensor, scale: Tensor, out: Tensor, bad: Tensor) -> None:
    """out [blocks, 16] <- the values of codes uint8 [blocks, 8] under scales [blocks] (E4M3, float16 or float32)."""
    count, byte = qdata.shape[0], scale.dtype == torch.float8_e4m3fn
    with torch.cuda.device(qdata.device):
        _decode[(triton.cdiv(count, _ROWS),)](
            qdata, scale.view(torch.uint8) if byte else scale, out, bad, count, BYTE=byte, ROWS=_ROWS, **_OPTIONS
        )


if triton is not None:
    _STEPS = tl.constexpr(STEPS["mse"])
    _PLACES = tl.constexpr(len(STEPS["mse"]))
    _PLACE_MASK = tl.constexpr((1 << ORDER_BITS) - 1)
    _INFINITE = tl.constexpr(0x7F800000)
    _MOST = tl.constexpr(0x45280000)
    """The bits of 6 x 448."""

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
    def _near(y):  # type: ignore[no-untyped-def]
        """`_round` for 0 <= y < 7."""
        above = (tl.maximum(y, 1.0).to(tl.int32, bitcast=True) & 0x7F800000) + (22 << 23)
        magic = above.to(tl.float32, bitcast=True)
        return (y + magic) - magic

    @triton.jit
    def _round(y):  # type: ignore[no-untyped-def]
        """The nearest level, ties to the even code; y >= 0. As in `trainer.nvfp4_plain`."""
        return _near(tl.minimum(y, 6.0))

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
    def _square(a, s, r, CLIP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """(a / s - its level)^2; s and r as in `_quotient`. CLIP: a / s may be 7 or more."""
        q = _quotient(a, s, r)
        level = _near(tl.minimum(q, 6.0)) if CLIP else _near(q)
        d = q - level
        return d * d

    @triton.jit
    def _error(  # type: ignore[no-untyped-def]
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, s, CLIP: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """The squared error of a block under scale s; this order of addition is part of the rule."""
        r = tl.div_rn(1.0, s)
        x0 = _square(a0, s, r, CLIP) + _square(a8, s, r, CLIP)
        x1 = _square(a1, s, r, CLIP) + _square(a9, s, r, CLIP)
        x2 = _square(a2, s, r, CLIP) + _square(a10, s, r, CLIP)
        x3 = _square(a3, s, r, CLIP) + _square(a11, s, r, CLIP)
        x4 = _square(a4, s, r, CLIP) + _square(a12, s, r, CLIP)
        x5 = _square(a5, s, r, CLIP) + _square(a13, s, r, CLIP)
        x6 = _square(a6, s, r, CLIP) + _square(a14, s, r, CLIP)
        x7 = _square(a7, s, r, CLIP) + _square(a15, s, r, CLIP)
        return (((x0 + x4) + (x2 + x6)) + ((x1 + x5) + (x3 + x7))) * s * s

    @triton.jit
    def _choose_if(a, top, SATURATED: tl.constexpr, MSE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """The scale's code, int32 [ROWS], of blocks with magnitudes a [ROWS, 16] and the bits ``top`` of their
        largest."""
        most = top.to(tl.float32, bitcast=True)
        first = _nearest_code(tl.div_rn(most, 6.0))
        code = tl.minimum(tl.maximum(first, 1), 126)
        if MSE:
            even, odd = tl.split(tl.reshape(a, (ROWS, 2, 2, 2, 2)))
            ee, eo = tl.split(even)
            oe, oo = tl.split(odd)
            eee, eeo = tl.split(ee)
            eoe, eoo = tl.split(eo)
            oee, oeo = tl.split(oe)
            ooe, ooo = tl.split(oo)
            a0, a8 = tl.split(eee)
            a4, a12 = tl.split(eeo)
            a2, a10 = tl.split(eoe)
            a6, a14 = tl.split(eoo)
            a1, a9 = tl.split(oee)
            a5, a13 = tl.split(oeo)
            a3, a11 = tl.split(ooe)
            a7, a15 = tl.split(ooo)
            least = tl.full((ROWS,), 0x7FFFFFFF, tl.int32)
            for place in tl.static_range(_PLACES):
                s = _value(tl.minimum(tl.maximum(first + _STEPS[place], 1), 126))
                if SATURATED or _STEPS[place] <= 0:
                    error = _error(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, s, True)
                else:
                    error = _error(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, s, False)
                least = tl.minimum(least, (error.to(tl.int32, bitcast=True) & ~_PLACE_MASK) | place)
            place = least & _PLACE_MASK
            step = tl.where(place == 0, 0, tl.where(place == 1, -1, place - 1))
            code = tl.minimum(tl.maximum(first + step, 1), 126)
        code = tl.where(top > 0, code, 0)
        return tl.where(top < _INFINITE, code, 0x7F)

    @triton.jit
    def _choose(a, top, MSE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """`_choose_if`: a scale above amax / 6 clips nothing, unless it is 448."""
        if tl.max(top, axis=0) > _MOST:
            code = _choose_if(a, top, True, MSE, ROWS)
        else:
            code = _choose_if(a, top, False, MSE, ROWS)
        return code

    @triton.jit
    def _settle(w, given, row, there, KEEP: tl.constexpr, MSE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """The scale bytes, int32 [ROWS]: new ones, or the kept ones except where outgrown."""
        size = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        top = tl.max(size, axis=1)  # as integers: above every number are infinity and NaN
        if KEEP:
            code = tl.load(given + row, mask=there, other=0).to(tl.int32)
            fits = (top.to(tl.float32, bitcast=True) <= 6.0 * _value(code)) & (top < _INFINITE)
            fits = fits | ((code & 0x7F) == 0x7F)  # a broken scale is told, not replaced
            if tl.min(fits.to(tl.int32), axis=0) == 0:
                code = tl.where(fits, code, _choose(size.to(tl.float32, bitcast=True), top, MSE, ROWS))
        else:
            code = _choose(size.to(tl.float32, bitcast=True), top, MSE, ROWS)
        return code

    @triton.jit
    def _tell(wrong, bad):  # type: ignore[no-untyped-def]
        """Raise the flag when any row is wrong. Every writer writes the same number: no atomic is needed."""
        if tl.max(wrong.to(tl.int32), axis=0) > 0:
            tl.store(bad, 1)

    @triton.jit
    def _fake(src, given, out, bad, count, KEEP: tl.constexpr, MSE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = row < count
        place = row[:, None] * 16 + tl.arange(0, 16)[None, :]
        w = tl.load(src + place, mask=there[:, None], other=0.0).to(tl.float32)
        code = _settle(w, given, row, there, KEEP, MSE, ROWS)
        wrong = (code & 0x7F) == 0x7F
        _tell(wrong, bad)
        scale = _value(code)
        s = scale[:, None]
        value = tl.abs(_round(_quotients(tl.abs(w), scale)) * s)
        sign = w.to(tl.int32, bitcast=True) & (-0x80000000)
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        value = tl.where(wrong[:, None], float("nan"), value)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=there[:, None])

    @triton.jit
    def _encode(  # type: ignore[no-untyped-def]
        src, given, codes, scales, bad, count,
        GIVEN: tl.constexpr, BYTE: tl.constexpr, FIXED: tl.constexpr, MSE: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = row < count
        place = row[:, None] * 16 + tl.arange(0, 16)[None, :]
        w = tl.load(src + place, mask=there[:, None], other=0.0).to(tl.float32)
        if FIXED:
            scale, wrong = _load_scale(given, row, there, BYTE)
            size = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            wrong = wrong | (tl.max(size, axis=1) >= _INFINITE)
        else:
            code = _settle(w, given, row, there, GIVEN, MSE, ROWS)
            tl.store(scales + row, code.to(tl.uint8), mask=there)
            wrong = (code & 0x7F) == 0x7F
            scale = _value(code)
        _tell(wrong, bad)
        if FIXED:
            s = scale[:, None]
            y = tl.div_rn(w, tl.where(s == 0.0, float("inf"), s))
            sign = y.to(tl.int32, bitcast=True)
            level = _round(tl.abs(y))
        else:
            sign = w.to(tl.int32, bitcast=True)
            level = _round(_quotients(tl.abs(w), scale))
        index = tl.where(level < 1.0, (level * 2.0).to(tl.int32), (level.to(tl.int32, bitcast=True) >> 22) - 252)
        nibble = index | ((sign >> 28) & 8)
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
    def _decode(codes, scales, out, bad, count, BYTE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
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
