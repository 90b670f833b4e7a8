"""NVFP4 in plain torch operations: every device, no tricks with memory. The fast paths are tested against this one.

Blocks are the last dimension: w is float32 [..., 16], a scale belongs to [...].
"""

import torch
from torch import Tensor

from trainer.nvfp4_cpu import CODES, E4M3, LEVELS, ORDER_BITS, STEPS


def choose(w: Tensor, rule: str) -> Tensor:
    """The scale of each block, float8_e4m3fn [...]; NaN for a block that holds an infinity or NaN."""
    a = w.abs()
    amax = a.amax(-1)
    base = (amax / 6).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).long() & 0x7F  # NaN may be 0xFF
    codes = torch.from_numpy(CODES).to(w.device)
    code = codes[0][base]
    if rule == "mse":
        keys = [_key(a, codes[place][base], place) for place in range(len(STEPS["mse"]))]
        place = torch.stack(keys).amin(0) & ((1 << ORDER_BITS) - 1)
        code = codes[place.long(), base]
    code = torch.where(amax > 0, code, 0)
    code = torch.where(torch.isfinite(amax), code, 0x7F)
    return code.to(torch.uint8).view(torch.float8_e4m3fn)


def encode(w: Tensor, scale: Tensor) -> Tensor:
    """The codes of blocks under given scales (any float type), uint8 [..., 8]."""
    s = scale.float()
    y = w / torch.where(s == 0, torch.inf, s)[..., None]
    index = torch.bucketize(_round(y.abs()), torch.tensor(LEVELS, device=w.device))
    code = index | torch.signbit(y).long() << 3
    return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)


def decode(qdata: Tensor, scale: Tensor) -> Tensor:
    """The values, float32 [..., 16], of codes [..., 8] and scales [...]."""
    levels = torch.tensor((*LEVELS, *(-level for level in LEVELS)), device=qdata.device)
    codes = torch.stack((qdata & 15, qdata >> 4), -1).flatten(-2)
    return levels[codes.long()] * scale.float()[..., None]


def fake(w: Tensor, scale: Tensor) -> Tensor:
    """decode(encode(w, scale), scale), bit for bit, without codes in between: float32 [..., 16]."""
    s = scale.float()
    level = _round((w / torch.where(s == 0, torch.inf, s)[..., None]).abs())
    return torch.copysign(level * s[..., None], w)


def _round(y: Tensor) -> Tensor:
    """The nearest level, ties to the even code; y >= 0."""
    y = y.clamp(max=6)
    # 2^22 times the power of two below y: a float32 this large counts in steps of half that power, the distance of the
    # levels.
    magic = ((y.clamp(min=1).view(torch.int32) & 0x7F800000) + (22 << 23)).view(torch.float32)
    return (y + magic) - magic


def _key(a: Tensor, code: Tensor, place: int) -> Tensor:
    s = E4M3.to(a.device)[code.long()]
    y = a / s[..., None]
    d = y - _round(y)
    d = d * d
    for half in (8, 4, 2, 1):  # this order of addition is part of the rule: other orders round differently
        d = d[..., :half] + d[..., half:]
    return (d[..., 0] * s * s).view(torch.int32) & (-1 << ORDER_BITS) | place
