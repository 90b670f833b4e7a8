"""Many weights at once: on a CUDA device without waiting for each.

    fake_quantise_many_([("a", master, view, kept_scales), ...])
    codes_and_scales = quantise_many([("a", master, kept_scales), ...])

The functions of `trainer.nvfp4` wait for the device after every weight, to say which one cannot be rounded; here it is
asked once, at the end. On other devices it is the same as calling them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from trainer import nvfp4_triton
from trainer.nvfp4 import (
    BLOCK,
    Rule,
    as_blocks,
    as_kept,
    as_target,
    check_rule,
    deliver,
    fake_quantise_,
    on_cuda,
    quantise,
)

__all__ = ["fake_quantise_many_", "quantise_many"]


def fake_quantise_many_(weights: Iterable[tuple[str, Tensor, Tensor, Tensor | None]], *, rule: Rule = "mse") -> None:
    """`fake_quantise_` of many weights, (name, src, out, keep) each.

    Raises as `fake_quantise_` does, for the first weight that is wrong; the others may then be written or not.
    """
    check_rule(rule)
    flags = _Flags()
    for name, src, out, keep in weights:
        if not on_cuda(src.device) or not src.numel():
            fake_quantise_(src, out, rule=rule, name=name, keep=keep)
            continue
        blocks, kept = as_blocks(src, name), as_kept(keep, src, name)
        target, flat = as_target(out, (src.shape[0], src.shape[1]), out.dtype, src.device, name)
        nvfp4_triton.fake(blocks, kept, flat, rule, flags.new(src, name, keep, rule))
        deliver(target, flat)
    flags.ask()


def quantise_many(
    weights: Iterable[tuple[str, Tensor, Tensor | None]], *, rule: Rule = "mse"
) -> list[tuple[Tensor, Tensor]]:
    """`quantise` of many weights, (name, w, keep) each. Raises as `quantise` does, for the first that is wrong."""
    check_rule(rule)
    flags = _Flags()
    results = []
    for name, w, keep in weights:
        if not on_cuda(w.device) or not w.numel():
            results.append(quantise(w, rule=rule, name=name, keep=keep))
            continue
        blocks = as_blocks(w, name)
        codes = torch.empty(blocks.shape[0], BLOCK // 2, dtype=torch.uint8, device=w.device)
        scale = torch.empty(blocks.shape[0], dtype=torch.float8_e4m3fn, device=w.device)
        nvfp4_triton.encode(blocks, as_kept(keep, w, name), codes, scale, rule, flags.new(w, name, keep, rule))
        results.append((codes.view(w.shape[0], w.shape[1] // 2), scale.view(w.shape[0], w.shape[1] // BLOCK)))
    flags.ask()
    return results


class _Flags:
    """One number on the device for each weight, and how to say what is wrong with that weight."""

    def __init__(self) -> None:
        self._raised: list[Tensor] = []
        self._explain: list[Callable[[], object]] = []
        self._free: dict[torch.device, list[Tensor]] = {}

    def new(self, w: Tensor, name: str, keep: Tensor | None, rule: Rule) -> Tensor:
        free = self._free.setdefault(w.device, [])
        if not free:  # many at once: clearing memory costs a launch
            free.extend(torch.zeros(512, dtype=torch.int32, device=w.device).split(1))  # type: ignore[no-untyped-call]
        self._raised.append(free.pop())
        self._explain.append(lambda: quantise(w, rule=rule, name=name, keep=keep))
        return self._raised[-1]

    def ask(self) -> None:
        if not self._raised or not bool(torch.cat([flag.to(self._raised[0].device) for flag in self._raised]).any()):
            return
        for flag, explain in zip(self._raised, self._explain, strict=True):
            if bool(flag):
                explain()
