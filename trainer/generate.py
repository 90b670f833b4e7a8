"""Greedy decoding and log-probabilities, many prompts at once.

    replies = generate(lm, ["<|im_start|>user…"], max_tokens=24)
    replies[0].text, replies[0].margin, replies[0].stopped

Prompts are sorted by length and decoded in batches of bounded size, left-padded under an explicit mask: a padding
position attends to itself alone, so no row of a softmax is empty (no NaN), and real tokens never see padding. A
finished row is dropped from the batch when enough rows have finished. Non-finite logits raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.model import LanguageModel

ENGINE = "greedy-2"
"""Version of the decoding rules; part of every cache key."""


class NonFiniteError(ArithmeticError):
    """Logits became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One decoded reply."""

    text: str
    tokens: tuple[int, ...]
    """Reply tokens without the stop token."""
    stopped: bool
    """Whether the model ended by itself (a stop token) within the limit."""
    margin: float
    """Smallest difference (nats) between best and second-best logit over the reply: how near it was to another."""
    margins: tuple[float, ...] = ()
    """That difference for every token, and for the stop token where the reply ended by itself."""


def generate(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    max_tokens: int | Sequence[int] = 24,
    batch_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """Greedy replies to rendered prompts, in the order given.

    ``max_tokens`` is one limit or one for each prompt; ``batch_tokens`` bounds prompt plus reply tokens of one batch
    (padded). Raises NonFiniteError.
    """
    limits = [max_tokens] * len(texts) if isinstance(max_tokens, int) else list(max_tokens)
    prompts = [lm.encode(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: (limits[i], len(prompts[i]), i))
    replies: list[Reply | None] = [None] * len(texts)
    done = 0
    for batch in _batches(order, prompts, limits, batch_tokens):
        for index, reply in zip(batch, _decode(lm, [prompts[i] for i in batch], limits[batch[-1]]), strict=True):
            replies[index] = _cut(lm, reply, limits[index])
        done += len(batch)
        if progress:
            progress(done, len(texts))
    return [reply for reply in replies if reply is not None]


def _batches(order: list[int], prompts: list[list[int]], limits: list[int], batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        width = len(prompts[index]) + limits[index]
        if batches and limits[batches[-1][0]] == limits[index] and (len(batches[-1]) + 1) * width <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass
class _Raw:
    tokens: list[int]
    margins: list[float]
    stopped: bool


def _cut(lm: LanguageModel, raw: _Raw, limit: int) -> Reply:
    tokens = raw.tokens[:limit]
    margins = raw.margins[: len(tokens) + raw.stopped]
    text: str = lm.tokenizer.decode(tokens, skip_special_tokens=True)
    return Reply(
        text=text,
        tokens=tuple(tokens),
        stopped=raw.stopped,
        margin=min(margins, default=float("inf")) if margins else 0.0,
        margins=tuple(margins),
    )


SHORTEST_PREFIX = 8
"""A shared beginning of fewer tokens is not worth a pass of its own."""


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share (a template's opening, a system message), short of any prompt's last
    one; 0 when it is not worth sharing."""
    first = prompts[0]
    length = min(len(prompt) for prompt in prompts) - 1
    for prompt in prompts:
        length = next((i for i in range(length) if prompt[i] != first[i]), length)
    return length if length >= SHORTEST_PREFIX and len(prompts) > 1 else 0


def prefix_cache(lm: LanguageModel, prefix: Sequence[int], count: int) -> Any:
    """A key-value cache for ``count`` rows that all begin with ``prefix``, computed once; gradients flow through it."""
    from transformers import DynamicCache

    cache = DynamicCache(config=lm.config)
    if prefix:
        ids = torch.tensor([list(prefix)], device=lm.device)
        lm.module.get_submodule("model")(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(count)
    return cache


@torch.inference_mode()
def _decode(lm: LanguageModel, prompts: list[list[int]], limit: int) -> list[_Raw]:
    """Decode one left-padded batch up to ``limit`` new tokens for each prompt."""
    shared = shared_prefix(prompts)
    cache = prefix_cache(lm, prompts[0][:shared], len(prompts))
    count, width = len(prompts), max(len(p) for p in prompts) - shared
    ids = torch.full((count, width), lm.pad_id)
    valid = torch.zeros((count, shared + width), dtype=torch.bool)
    valid[:, :shared] = True
    for row, prompt in enumerate(prompts):
        own = len(prompt) - shared
        ids[row, width - own :] = torch.tensor(prompt[shared:])
        valid[row, shared + width - own :] = True
    ids, valid = ids.to(lm.device), valid.to(lm.device)
    positions = (valid.long().cumsum(1) - 1)[:, shared:].clamp_min(0)
    causal = torch.ones(width, shared + width, dtype=torch.bool, device=lm.device).tril(shared)
    itself = torch.zeros_like(causal)
    itself[:, shared:] = torch.eye(width, dtype=torch.bool, device=lm.device)
    mask = (causal & (valid[:, None, :] | itself))[:, None]
    raws = [_Raw([], [], False) for _ in prompts]
    alive = list(range(count))
    stops = torch.tensor(lm.stop_ids, device=lm.device)
    for step in range(limit):
        logits = _last_logits(lm, ids, mask, positions, cache)
        best = logits.topk(2, dim=-1)
        values = best.values.float()
        if not bool(torch.isfinite(values).all()):  # topk puts NaN and infinity first: two values speak for the row
            raise NonFiniteError(f"{lm.path}: non-finite logits while decoding; the weights are broken")
        tokens, margins = best.indices[:, 0], values[:, 0] - values[:, 1]
        ended = torch.isin(tokens, stops).tolist()
        for slot, token, margin, end in zip(alive, tokens.tolist(), margins.tolist(), ended, strict=True):
            if raws[slot].stopped:
                continue
            raws[slot].margins.append(margin)
            if end:
                raws[slot].stopped = True
            else:
                raws[slot].tokens.append(token)
        running = [i for i, slot in enumerate(alive) if not raws[slot].stopped]
        if not running or step == limit - 1:
            break
        if len(running) <= len(alive) // 2:  # worth a copy of the cache
            keep = torch.tensor(running, device=lm.device)
            cache.batch_select_indices(keep)
            tokens, positions, valid = tokens[keep], positions[keep], valid[keep]
            alive = [alive[i] for i in running]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        valid = torch.cat([valid, valid.new_ones(len(alive), 1)], dim=1)
        mask = valid[:, None, None, :]
    return raws


def _last_logits(lm: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Logits [batch, vocabulary] of the last position, in the model's dtype."""
    body, head = lm.module.get_submodule("model"), lm.module.get_submodule("lm_head")
    hidden = body(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, -1]
    logits: Tensor = head(hidden)
    return logits
