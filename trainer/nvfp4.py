"""NVFP4: blocks of 16 weights along the input features, 4-bit codes (E2M1) and one 8-bit scale (E4M3) a block.

value = E2M1 code x block scale; there is no scale for the whole tensor.
"""

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["mse", "amax"]
BLOCK = 16
_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NEIGHBOURS = {"amax": (0,), "mse": (0, 1, -1, 2)}


def _check(w: Tensor, name: str) -> None:
    label = f"tensor {name!r}" if name else "the tensor"
    if w.ndim != 2 or w.shape[1] % BLOCK:
        raise ValueError(f"{label} has shape {tuple(w.shape)}: NVFP4 needs [out, in] with in divisible by {BLOCK}")
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{label} is {w.dtype}: NVFP4 quantises float32, bfloat16 or float16")
    if not bool(torch.isfinite(w).all()):
        raise ValueError(f"{label} holds an infinity or NaN: it cannot be quantised")


def _round(y: Tensor) -> Tensor:
    c = y.clamp(max=6.0)
    p = (c.clamp(min=1.0).view(torch.int32) & 0x7F800000) + (22 << 23)
    m = p.view(torch.float32)
    return (c + m) - m


def _scales(w: Tensor, rule: Rule) -> Tensor:
    a = w.abs()
    amax = a.amax(-1)
    base = (amax / 6).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    best = None
    for step in _NEIGHBOURS[rule]:
        code = (base + step).clamp(1, 126)
        s = code.to(torch.uint8).view(torch.float8_e4m3fn).float()
        y = a / s[..., None]
        d = (y - _round(y)).square()
        d = d[..., :8] + d[..., 8:]
        d = d[..., :4] + d[..., 4:]
        d = d[..., :2] + d[..., 2:]
        e = (d[..., 0] + d[..., 1]) * (s * s)
        if best is None:
            best, chosen = e, code
        else:
            better = e < best
            best, chosen = torch.where(better, e, best), torch.where(better, code, chosen)
    return torch.where(amax > 0, chosen, 0).to(torch.uint8).view(torch.float8_e4m3fn)


def quantise(w: Tensor, *, rule: Rule = "mse", name: str = "") -> tuple[Tensor, Tensor]:
    """(qdata uint8 [out, in / 2], scale float8_e4m3fn [out, in / 16]) of a weight [out, in]."""
    _check(w, name)
    scale = _scales(w.float().unflatten(-1, (-1, BLOCK)), rule)
    return quantise_with_scales(w, scale), scale


def quantise_with_scales(w: Tensor, scale: Tensor) -> Tensor:
    """The codes, uint8 [out, in / 2], of a weight under given block scales [out, in / 16]."""
    _check(w, "")
    blocks = w.float().unflatten(-1, (-1, BLOCK))
    s = scale.float()[..., None]
    y = blocks.abs() / torch.where(s == 0, torch.inf, s)
    r = _round(y)
    index = torch.bucketize(r, torch.tensor(_LEVELS, device=w.device)).to(torch.uint8)
    code = (index + 8 * torch.signbit(blocks).to(torch.uint8)).flatten(-2)
    return code[:, 0::2] | code[:, 1::2] << 4


def dequantise(
    qdata: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """The weight [out, in] of codes and scales; exact in bfloat16 for E4M3 scales."""
    levels = torch.tensor(_LEVELS + tuple(-v for v in _LEVELS), device=qdata.device)
    codes = torch.stack((qdata & 15, qdata >> 4), -1).flatten(-2).int()
    w = (levels[codes].unflatten(-1, (-1, BLOCK)) * scale.float()[..., None]).flatten(-2)
    return w.to(dtype) if out is None else out.copy_(w)


@torch.no_grad()
def fake_quantise_(src: Tensor, out: Tensor, *, rule: Rule = "mse", name: str = "") -> None:
    """out <- dequantise(quantise(src)), bit for bit."""
    dequantise(*quantise(src, rule=rule, name=name), out=out)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, w: Tensor, rule: Rule) -> Tensor:
        out = torch.empty_like(w)
        fake_quantise_(w, out, rule=rule)
        return out

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def fake_quantise(w: Tensor, *, rule: Rule = "mse") -> Tensor:
    """The quantised weight, with the gradient passed straight through."""
    result: Tensor = _StraightThrough.apply(w, rule)  # type: ignore[no-untyped-call]
    return result


def quantise_activations(x: Tensor) -> Tensor:
    """x [..., features] as NVFP4 activations: blocks of 16, scale amax / 6 in E4M3; same dtype as x."""
    flat = x.detach().reshape(-1, x.shape[-1])
    out = torch.empty_like(flat)
    fake_quantise_(flat, out, rule="amax", name="activations")
    return out.view(x.shape)
