"""Rows one after the other in a single sequence: no padding, and one gradient of the size of the model per step.

    states = forward(lm, pack)      # [tokens, features], gradients flow

Every linear layer sees the rows' tokens and nothing else; only attention, a small part of the arithmetic, lays them out
in a padded grid. The rows' common opening (a template's system message is half of every row) stands once, in front, and
every row attends to it. Measured on SmolLM2 and two CPU cores: docs/experiments.md, "What a step costs".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.fused import embed
from trainer.model import LanguageModel, ModelError
from trainer.numerics import W4A4Linear

ATTENTION = "align_packed"
"""The name under which transformers' attention layers find ``attention``."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Where each token of a packed sequence belongs. The first ``shared`` tokens are the opening of every row."""

    ids: Tensor
    """[tokens] int64: the shared opening, then each row's own tokens."""
    positions: Tensor
    """[tokens] int64: the place of each token in its row."""
    slots: Tensor
    """[own tokens] int64: row * width + place among the row's own tokens."""
    rows: int
    width: int
    """Own tokens of the longest row."""
    shared: int


def pack(rows: Sequence[Sequence[int]], shared: int, device: torch.device) -> Pack:
    """Lay rows of token ids, all beginning with the same ``shared`` tokens, in one sequence."""
    own = [list(row[shared:]) for row in rows]
    width = max(len(row) for row in own)
    ids = [*rows[0][:shared], *(token for row in own for token in row)]
    places = [place for row in own for place in range(len(row))]
    slots = [index * width + place for index, row in enumerate(own) for place in range(len(row))]
    return Pack(
        ids=torch.tensor(ids, device=device),
        positions=torch.tensor([*range(shared), *(shared + place for place in places)], device=device),
        slots=torch.tensor(slots, device=device),
        rows=len(own),
        width=width,
        shared=shared,
    )


def _check_ends(lm: LanguageModel) -> None:
    """Both ends are taken by their weights (`trainer.fused`): they must be nothing but these."""
    first, last = lm.module.get_submodule("model.embed_tokens"), lm.module.get_submodule("lm_head")
    if type(first) is not nn.Embedding:
        raise ModelError(f"{lm.folder}: its embedding is a {type(first).__name__}, which cannot be trained here")
    if type(last) not in (nn.Linear, W4A4Linear) or last.bias is not None:
        raise ModelError(f"{lm.folder}: its output layer is not a plain matrix, and cannot be trained here")


def forward(lm: LanguageModel, packed: Pack) -> Tensor:
    """The last hidden states [tokens, features] of a packed sequence, in the model's dtype.

    Raises ModelError for an architecture whose attention cannot be packed, or whose ends are more than a matrix.
    """
    _register()
    _check_ends(lm)
    config: Any = lm.module.get_submodule("model").config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        body = lm.module.get_submodule("model")
        states: Tensor = body(
            inputs_embeds=embed(packed.ids, body.get_parameter("embed_tokens.weight"))[None],
            position_ids=packed.positions[None],
            use_cache=False,
            pack=packed,
        ).last_hidden_state
    finally:
        config._attn_implementation = before
    return states[0]


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    pack: Pack | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each row of a pack: ``query`` [1, heads, tokens, features], ``key`` and ``value``
    [1, heads or fewer, tokens, features] to [1, tokens, heads, features].

    The scores are softmaxed in float32. Raises ModelError where the layer does not hand the pack on, or looks back
    over fewer tokens than a row has.
    """
    if pack is None or attention_mask is not None:
        raise ModelError(f"{type(module).__name__}: this architecture's attention cannot be packed")
    if sliding_window is not None and sliding_window < pack.shared + pack.width:
        raise ModelError(f"rows of {pack.shared + pack.width} tokens, but layers look back over {sliding_window}")
    shared, rows, width = pack.shared, pack.rows, pack.width
    heads, groups, size = query.shape[1], key.shape[1], query.shape[3]
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [tokens, heads, features]
    grid = rows * width
    # [rows, groups, heads of a group x width, features]: the heads that share a key share its product
    q_own = _spread(q[shared:].reshape(-1, heads * size), pack.slots, grid)
    q_own = q_own.view(rows, width, groups, heads // groups, size).permute(0, 2, 3, 1, 4)
    q_own = q_own.reshape(rows, groups, -1, size)
    k_own, v_own = (
        _spread(part[shared:].reshape(-1, groups * size), pack.slots, grid)
        .view(rows, width, groups, size)
        .permute(0, 2, 1, 3)
        for part in (k, v)
    )
    scores = (q_own @ k_own.transpose(2, 3)).float()
    later = torch.ones(width, width, dtype=torch.bool, device=query.device).triu(1).repeat(heads // groups, 1)
    scores = scores.masked_fill(later, float("-inf"))
    if shared:
        k_front, v_front = (part[:shared].transpose(0, 1) for part in (k, v))  # [groups, shared, features]
        flat = q_own.transpose(0, 1).reshape(groups, -1, size)
        front = (flat @ k_front.transpose(1, 2)).view(groups, rows, -1, shared).transpose(0, 1)
        scores = torch.cat([front.float(), scores], -1)
    weights = (scores * scaling).softmax(-1).to(query.dtype)
    mixed = weights[..., shared:] @ v_own
    if shared:
        flat = weights[..., :shared].transpose(0, 1).reshape(groups, -1, shared)
        mixed = mixed + (flat @ v_front).view(groups, rows, -1, size).transpose(0, 1)
    mixed = mixed.view(rows, groups, heads // groups, width, size).permute(0, 3, 1, 2, 4).reshape(grid, -1)
    out = _collect(mixed, pack.slots).view(-1, heads, size)
    if shared:
        front = F.scaled_dot_product_attention(
            query[:, :, :shared],
            key[:, :, :shared],
            value[:, :, :shared],
            is_causal=True,
            scale=scaling,
            enable_gqa=heads != groups,
        )
        out = torch.cat([front[0].transpose(0, 1), out])
    return out[None], None


class _Spread(torch.autograd.Function):
    """Rows to their slots of a zeroed grid. Autograd's own way back from a gather adds, row by row; slots are distinct,
    so both ways are plain copies."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, slots: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(slots)
        return values.new_zeros(count, values.shape[1]).index_copy_(0, slots, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """The rows at the given slots of a grid."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.count = len(grid)
        return grid.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.count, gradient.shape[1]).index_copy_(0, ctx.saved_tensors[0], gradient), None


def _spread(values: Tensor, slots: Tensor, count: int) -> Tensor:
    spread: Tensor = _Spread.apply(values, slots, count)  # type: ignore[no-untyped-call]
    return spread


def _collect(grid: Tensor, slots: Tensor) -> Tensor:
    collected: Tensor = _Collect.apply(grid, slots)  # type: ignore[no-untyped-call]
    return collected
