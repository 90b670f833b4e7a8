"""The two ends of a model, whose gradients are the size of the vocabulary, computed where they stay.

    total, losses = head_loss(hidden, head, share, targets=..., base_states=..., base_head=...)
    total.backward()                      # hidden's gradient; the output layer's is already in head.grad
    states = embed(ids, weight)           # as torch.nn.functional.embedding

Autograd would map such a gradient anew for every operation, and keep the logits of a whole batch in several copies.
Here a loss and its gradient are taken in one pass over pieces that fit a CPU's cache, and the gradient of the weight
goes straight to memory that is used again. Measured: docs/experiments.md, "What a step costs".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 16
"""Positions taken at a time: float32 logits of 50,000 words are then 3 MB."""

_kept: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}


def scratch(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory of ``like``'s type and place that is used again by the next caller of the same ``name``; not cleared."""
    key = (name, like.device, like.dtype)
    size = math.prod(shape)
    if key not in _kept or _kept[key].numel() < size:
        _kept.pop(key, None)
        _kept[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    return _kept[key][:size].view(shape)


def head_loss(
    hidden: Tensor,
    head: Tensor,
    share: Tensor,
    *,
    targets: Tensor,
    base_states: Tensor,
    base_head: Tensor,
) -> tuple[Tensor, Tensor]:
    """(sum of share x loss, loss of each position in nats), float32 [] and [positions].

    The first ``len(targets)`` of ``hidden`` [positions, features] are judged by cross-entropy with ``targets`` (int64);
    the others by KL(base || candidate), the base's logits being ``base_states`` [others, features] through
    ``base_head`` [vocabulary, features]. ``head``: the output layer [vocabulary, features]; its gradient is added to
    ``head.grad`` during the forward pass (when it asks for one), for an upstream gradient of 1: call ``backward`` on
    the sum itself. ``share``: float32 [positions]. The memory of gradients is one for the process: one model trains at
    a time.
    """
    if not torch.is_grad_enabled():
        hidden, head = hidden.detach(), head.detach()
    total, losses = _HeadLoss.apply(hidden, head, share, targets, base_states, base_head)  # type: ignore[no-untyped-call]
    return total, losses


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, share: Tensor, targets: Tensor, base_states: Tensor, base_head: Tensor
    ) -> tuple[Tensor, Tensor]:
        count, first = len(hidden), len(targets)
        logits = torch.mm(hidden, head.t(), out=scratch("logits", (count, len(head)), hidden))
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        for start in range(0, first, PIECE):
            part = slice(start, min(start + PIECE, first))
            log_p = logits[part].log_softmax(-1, dtype=torch.float32)
            losses[part] = -log_p.gather(1, targets[part, None])[:, 0]
            gradient = log_p.exp_()
            gradient.scatter_add_(1, targets[part, None], gradient.new_full((len(gradient), 1), -1.0))
            logits[part] = gradient.mul_(share[part, None])
        base_logits = torch.mm(
            base_states, base_head.t(), out=scratch("base logits", (count - first, len(head)), hidden)
        )
        for start in range(first, count, PIECE):
            part = slice(start, min(start + PIECE, count))
            log_p = logits[part].log_softmax(-1, dtype=torch.float32)
            log_q = base_logits[part.start - first : part.stop - first].log_softmax(-1, dtype=torch.float32)
            q = log_q.exp()
            losses[part] = (q * log_q.sub_(log_p)).sum(-1)
            logits[part] = log_p.exp_().sub_(q).mul_(share[part, None])
        if head.requires_grad:
            if head.grad is None:
                head.grad = torch.mm(logits.t(), hidden, out=scratch("head gradient", head.shape, hidden))
            else:
                head.grad += torch.mm(logits.t(), hidden)
        if hidden.requires_grad:
            ctx.save_for_backward(logits @ head)
        ctx.mark_non_differentiable(losses)
        return (losses * share).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden = ctx.saved_tensors[0] if ctx.saved_tensors else None
        return hidden, None, None, None, None, None


def embed(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows ``ids`` (int64, [tokens]) of ``weight`` [vocabulary, features]. On the way back the gradient is added to
    ``weight.grad``, the places of a token in float32. Every token learns, also the one that a configuration names as
    padding: nothing is padded here, and some models end their turns with it."""
    states: Tensor = _Embed.apply(ids, weight)  # type: ignore[no-untyped-call]
    return states


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.ids, ctx.weight = ids, weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        weight = ctx.weight
        if weight.requires_grad:
            tokens, places = torch.unique(ctx.ids, return_inverse=True)
            sums = torch.zeros(len(tokens), weight.shape[1], dtype=torch.float32, device=weight.device)
            sums.index_add_(0, places, gradients[0].float())
            if weight.grad is None:
                weight.grad = scratch("embedding gradient", weight.shape, weight).zero_()
            weight.grad.index_add_(0, tokens, sums.to(weight.dtype))
        return None, None
