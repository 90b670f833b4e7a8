"""NVFP4: 4-bit weights in blocks of 16 along the input features, with one 8-bit scale a block.

    qdata, scale = quantise(weight)                 # what a file holds
    weight = dequantise(qdata, scale)               # exact in bfloat16
    fake_quantise_(master, out=shadow)              # both at once, for a forward pass in shipping numerics

A value is level x scale: the level one of +-(0, 0.5, 1, 1.5, 2, 3, 4, 6) (E2M1, a sign bit and the index; two codes a
byte, the even column in the low half), the scale a float8 E4M3FN. There is no scale for the whole tensor (unlike
NVIDIA's own layout), so usual weights have scales at E4M3's coarse end, where choosing the scale well matters. The
formats are those of the OCP Microscaling (MX) specification 1.0 (E2M1) and the OCP 8-bit floating point specification
1.0 (E4M3).

The rules, in float32 arithmetic of IEEE 754 without reordering, so that every device and thread count gives the same
bits:

- `amax`: scale = (largest magnitude of the block) / 6 in E4M3, to nearest, ties to even.
- `mse`: of seven codes, one below to five above that of `amax`, the one with the least squared error over the block;
  errors are compared without their last three bits, and equal ones go to the code nearer that of `amax`, then to the
  lower.
- A scale is at most 448 (larger weights saturate at 6 x 448) and, unless the block is all zeros, at least 2^-9 (so
  weights of at most 2^-11 become zeros). A block of zeros has scale 0.
- A code is the level nearest to weight / scale; ties go to the even index; beyond 6 is 6. The sign bit is kept, also of
  zeros: -0.0, and what rounds to zero from below, has code 8. Under a scale of 0 a code is the sign alone.
- Infinities and NaN in weights or scales are refused.

Consequences, all tested: quantising a decoded weight with its stored scales returns the stored codes (but for levels
other than 0 under a scale of 0); decoding to bfloat16 is exact for E4M3 scales; an outlier's block has a large scale
and small neighbours become 0.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainer import nvfp4_jit, nvfp4_plain, nvfp4_triton
from trainer.nvfp4_cpu import BLOCK, NonFiniteError, Piece, each_piece

__all__ = [
    "BLOCK",
    "NonFiniteError",
    "Rule",
    "dequantise",
    "fake_quantise",
    "fake_quantise_",
    "quantise",
    "quantise_activations",
    "quantise_with_scales",
]

Rule = Literal["mse", "amax"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_JIT = (torch.float32, torch.bfloat16)
"""What the compiled path writes."""
_SCALES = (torch.float8_e4m3fn, torch.float16, torch.float32)
_SLAB = 1 << 20
"""Blocks at a time on other devices: bounds the temporary memory of the plain path to about a gigabyte."""


def quantise(w: Tensor, *, rule: Rule = "mse", name: str = "", keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight.

    w: float32, bfloat16 or float16 [out, in], in divisible by 16. Returns qdata uint8 [out, in / 2] and scale
    float8_e4m3fn [out, in / 16]. `name` is for the errors: `TypeError`, `ValueError` for the shape or the rule,
    `NonFiniteError`.

    `keep`: scales float8_e4m3fn [out, in / 16] that the weight already has in its file. A block keeps its own as long
    as none of its values exceeds 6 x scale; only a block that has outgrown it gets a new one by `rule`. So a weight
    that was decoded, and perhaps trained a little, does not jump to another grid, and one that was not trained keeps
    its bytes.
    """
    blocks = as_blocks(w, name)
    check_rule(rule)
    kept = as_kept(keep, w, name)
    qdata = torch.empty(blocks.shape[0], BLOCK // 2, dtype=torch.uint8, device=w.device)
    scale = torch.empty(blocks.shape[0], dtype=torch.float8_e4m3fn, device=w.device)

    def piece(p: Piece, part: slice) -> None:
        p.load(blocks[part])
        p.refuse_nan()
        _settle(p, rule, kept, part)
        p.encode()
        qdata[part].numpy()[...] = p.codes
        scale[part].view(torch.uint8).numpy()[...] = p.scale8.view(torch.uint8).numpy()

    def plain(part: slice) -> None:
        slab = blocks[part].float()
        scale[part] = _plain_scales(slab, rule, kept, part)
        _refuse_nan(scale[part])
        qdata[part] = nvfp4_plain.encode(slab, scale[part])

    def quick(bad: Tensor) -> None:
        nvfp4_triton.encode(blocks, kept, qdata, scale, rule, bad)

    _work(blocks.shape[0], piece, plain, quick, name, values=blocks, scales=kept)
    return qdata.view(w.shape[0], w.shape[1] // 2), scale.view(w.shape[0], w.shape[1] // BLOCK)


def quantise_with_scales(w: Tensor, scale: Tensor, *, name: str = "") -> Tensor:
    """The codes, uint8 [out, in / 2], of a weight as in `quantise` under scales [out, in / 16] of E4M3, float16 or
    float32.
    """
    blocks = as_blocks(w, name)
    scales = _flat_scales(scale, (w.shape[0], w.shape[1] // BLOCK), name)
    qdata = torch.empty(blocks.shape[0], BLOCK // 2, dtype=torch.uint8, device=w.device)

    def piece(p: Piece, part: slice) -> None:
        p.load(blocks[part])
        p.refuse_nan()
        p.take_scales(scales[part])
        p.encode()
        qdata[part].numpy()[...] = p.codes

    def plain(part: slice) -> None:
        slab = blocks[part].float()
        _refuse_nan(slab)
        _refuse_nan(scales[part])
        qdata[part] = nvfp4_plain.encode(slab, scales[part])

    def quick(bad: Tensor) -> None:
        nvfp4_triton.encode_under(blocks, scales, qdata, bad)

    _work(blocks.shape[0], piece, plain, quick, name, values=blocks, scales=scales)
    return qdata.view(w.shape[0], w.shape[1] // 2)


def dequantise(
    qdata: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None, name: str = ""
) -> Tensor:
    """The weight [out, in] of codes uint8 [out, in / 2] and scales [out, in / 16] (E4M3, float16 or float32).

    The product is taken in float32 and rounded once to `dtype` (float32, bfloat16 or float16), or to that of `out`,
    which is then filled and returned. Exact for E4M3 scales. Raises `TypeError`, `ValueError`, and `NonFiniteError` for
    such scales.
    """
    if qdata.dtype != torch.uint8 or qdata.ndim != 2 or qdata.shape[1] % 8:
        raise ValueError(
            f"{_label(name)}: qdata is {qdata.dtype} {tuple(qdata.shape)}, not uint8 [out, a multiple of 8]"
        )
    shape = (qdata.shape[0], qdata.shape[1] * 2)
    scales = _flat_scales(scale, (shape[0], shape[1] // BLOCK), name)
    target, flat = as_target(out, shape, dtype, qdata.device, name)
    codes = qdata.detach().contiguous().view(-1, BLOCK // 2)

    def piece(p: Piece, part: slice) -> None:
        p.take_scales(scales[part])
        p.decode(codes[part].numpy(), flat[part])

    def plain(part: slice) -> None:
        _refuse_nan(scales[part])
        flat[part] = nvfp4_plain.decode(codes[part], scales[part]).to(flat.dtype)

    def quick(bad: Tensor) -> None:
        nvfp4_triton.decode(codes, scales, flat, bad)

    _work(codes.shape[0], piece, plain, quick, name, scales=scales)
    return deliver(target, flat)


def fake_quantise_(src: Tensor, out: Tensor, *, rule: Rule = "mse", name: str = "", keep: Tensor | None = None) -> None:
    """out <- dequantise(*quantise(src, rule=rule, keep=keep)), bit for bit, in one pass and without a gradient.

    src: as in `quantise`; out: the same shape, float32, bfloat16 or float16; it may be src itself. Raises as `quantise`
    does; out is then partly written.
    """
    check_rule(rule)
    _fake(src, out, rule, name, strict=True, keep=keep)


def fake_quantise(w: Tensor, *, rule: Rule = "mse", name: str = "") -> Tensor:
    """The quantised weight, of w's shape and dtype; the gradient goes straight through to w, unchanged."""
    check_rule(rule)
    result: Tensor = _StraightThrough.apply(w, rule, name, True)  # type: ignore[no-untyped-call]
    return result


def quantise_activations(x: Tensor) -> Tensor:
    """Activations as a 4-bit kernel sees them, of x's shape and dtype: rule `amax` on blocks of 16 along the last
    dimension.

    x: float32, bfloat16 or float16 [..., features], features divisible by 16. A block that holds an infinity or NaN
    becomes NaN: nothing here waits for a device to find out. The gradient goes straight through.
    """
    rows = x.reshape(-1, x.shape[-1])
    result: Tensor = _StraightThrough.apply(rows, "amax", "activations", False)  # type: ignore[no-untyped-call]
    return result.view(x.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, rule: Rule, name: str, strict: bool) -> Tensor:
        out = torch.empty_like(w, memory_format=torch.contiguous_format)
        _fake(w, out, rule, name, strict=strict)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


def _fake(src: Tensor, out: Tensor, rule: Rule, name: str, *, strict: bool, keep: Tensor | None = None) -> None:
    blocks = as_blocks(src, name)
    kept = as_kept(keep, src, name)
    target, flat = as_target(out, (src.shape[0], src.shape[1]), out.dtype, src.device, name)
    apart = flat.untyped_storage().data_ptr() != blocks.untyped_storage().data_ptr()
    if not strict and rule == "amax" and kept is None and src.device.type == "cpu" and src.dtype == out.dtype in _JIT:
        nvfp4_jit.activations(blocks, flat)
        deliver(target, flat)
        return
    fast = apart and src.device.type == "cpu" and src.dtype == torch.float32 and flat.dtype in _JIT
    if fast and kept is not None and nvfp4_jit.refresh(blocks, kept, flat, rule):
        deliver(target, flat)
        return
    # What cannot be rounded comes through here as well, and is named.

    def piece(p: Piece, part: slice) -> None:
        p.load(blocks[part])
        if strict:
            p.refuse_nan()
        _settle(p, rule, kept, part)
        p.encode()
        p.decode(p.codes, flat[part])

    def plain(part: slice) -> None:
        slab = blocks[part].float()
        scale = _plain_scales(slab, rule, kept, part)
        if strict:
            _refuse_nan(scale)
        flat[part] = nvfp4_plain.fake(slab, scale).to(flat.dtype)

    def quick(bad: Tensor) -> None:
        nvfp4_triton.fake(blocks, kept, flat, rule, bad)

    _work(blocks.shape[0], piece, plain, quick, name, values=blocks, scales=kept, strict=strict)
    deliver(target, flat)


def _work(
    count: int,
    piece: Callable[[Piece, slice], None],
    plain: Callable[[slice], None],
    quick: Callable[[Tensor], None],
    name: str,
    *,
    values: Tensor | None = None,
    scales: Tensor | None = None,
    strict: bool = True,
) -> None:
    """Run the path for the CPU, for CUDA or for any device; put the tensor's name and the place into a complaint."""
    (given,) = {tensor.device for tensor in (values, scales) if tensor is not None}
    try:
        with torch.no_grad():
            if given.type == "cpu":
                each_piece(count, piece)
            elif on_cuda(given) and count:
                quick(bad := torch.zeros(1, dtype=torch.int32, device=given))
                if strict and bool(bad):  # only this waits for the device
                    raise NonFiniteError
            else:
                for start in range(0, count, _SLAB):
                    plain(slice(start, start + _SLAB))
    except NonFiniteError:
        for what, tensor in (("weight", values), ("scale", scales)):
            if tensor is not None and len(bad := (~torch.isfinite(tensor.float())).flatten().nonzero()):
                raise NonFiniteError(
                    f"{_label(name)}: {len(bad)} {what}s are infinite or NaN, the first at flat index {int(bad[0])}"
                ) from None
        raise


def on_cuda(device: torch.device) -> bool:
    """Whether tensors on ``device`` take the path of `trainer.nvfp4_triton`."""
    return device.type == "cuda" and nvfp4_triton.available()


def _settle(p: Piece, rule: Rule, kept: Tensor | None, part: slice) -> None:
    """Give the loaded blocks their scales: the kept ones, except where outgrown, or new ones."""
    if kept is None:
        p.choose(rule)
        return
    p.take_scales(kept[part])
    p.scale8.copy_(kept[part])
    outgrown = p.outgrown()
    if outgrown.size:  # few: the plain path, which gives the same bits, on a copy of these blocks alone
        p.scale8.view(torch.uint8)[outgrown] = nvfp4_plain.choose(p.copy_of(outgrown), rule).view(torch.uint8)
        p.take_scales(p.scale8)


def _plain_scales(slab: Tensor, rule: Rule, kept: Tensor | None, part: slice) -> Tensor:
    if kept is None:
        return nvfp4_plain.choose(slab, rule)
    _refuse_nan(kept[part])
    scale = kept[part].clone()
    outgrown = (~(slab.abs().amax(-1) <= 6 * scale.float())).nonzero()[:, 0]  # NaN fits nowhere
    if len(outgrown):  # few: choosing costs many times what the rest of the pass does
        scale.view(torch.uint8)[outgrown] = nvfp4_plain.choose(slab[outgrown], rule).view(torch.uint8)
    return scale


def as_kept(keep: Tensor | None, w: Tensor, name: str) -> Tensor | None:
    if keep is None:
        return None
    if keep.dtype != torch.float8_e4m3fn:
        raise TypeError(f"{_label(name)}: scales to keep are {keep.dtype}, not float8_e4m3fn")
    return _flat_scales(keep, (w.shape[0], w.shape[1] // BLOCK), name)


def as_blocks(w: Tensor, name: str) -> Tensor:
    if w.dtype not in _FLOATS:
        raise TypeError(f"{_label(name)} is {w.dtype}: NVFP4 takes float32, bfloat16 or float16")
    if w.ndim != 2 or w.shape[1] % BLOCK:
        raise ValueError(
            f"{_label(name)} has shape {tuple(w.shape)}: NVFP4 needs [out, in] with in divisible by {BLOCK}"
        )
    return w.detach().contiguous().view(-1, BLOCK)


def _flat_scales(scale: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    if scale.dtype not in _SCALES:
        raise TypeError(f"{_label(name)}: scales are {scale.dtype}, not float8_e4m3fn, float16 or float32")
    if tuple(scale.shape) != shape:
        raise ValueError(f"{_label(name)}: scales have shape {tuple(scale.shape)}, not {shape}")
    return scale.detach().contiguous().view(-1)


def as_target(
    out: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, name: str
) -> tuple[Tensor, Tensor]:
    """The tensor to return, and contiguous blocks to fill: its own memory where possible."""
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    if out.dtype not in _FLOATS or tuple(out.shape) != shape or out.device != device:
        raise ValueError(
            f"{_label(name)}: output is {out.dtype} {tuple(out.shape)} on {out.device}, not float {shape} on {device}"
        )
    plain = out.detach()
    return out, (plain if plain.is_contiguous() else torch.empty_like(plain).contiguous()).view(-1, BLOCK)


def deliver(out: Tensor, blocks: Tensor) -> Tensor:
    if not out.is_contiguous():
        out.detach().copy_(blocks.view(out.shape))
    return out


def check_rule(rule: str) -> None:
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}: choose one of {', '.join(get_args(Rule))}")


def _label(name: str) -> str:
    return f"tensor {name!r}" if name else "the tensor"


def _refuse_nan(x: Tensor) -> None:
    if not bool(torch.isfinite(x.float()).all()):
        raise NonFiniteError
