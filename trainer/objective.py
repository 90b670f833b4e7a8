"""What a step minimises: completion cross-entropy on target rows, KL(base || candidate) on contrast and replay rows.

The base's side of the KL is computed from its own last hidden states at the completion positions, taken once
(``BaseTraces``), and its output layer: exact, and smaller than logits by vocabulary / features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.examples import Batch, Row, batches
from trainer.model import LanguageModel
from trainer.packed import forward

LOGIT_ROWS = 128
"""Positions whose logits are computed at a time. Whole, they are the largest tensors of a step (vocabulary x 4 bytes x
positions), which a CPU's allocator maps and unmaps anew for each of a dozen operations."""


def hidden_at(lm: LanguageModel, batch: Batch) -> Tensor:
    """Last hidden states [targets, features] at the places that predict the batch's targets."""
    return forward(lm, batch.pack).index_select(0, batch.where)


def kl(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(base || candidate) in nats for each position: [n] float32 from two [n, vocabulary] of logits."""
    base, candidate = base_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (base.exp() * (base - candidate)).sum(-1)


class BaseTraces:
    """The base's last hidden states at the completions of ``rows``, and its output layer."""

    @torch.no_grad()
    def __init__(self, base: LanguageModel, rows: Sequence[Row], *, batch_tokens: int = 4096) -> None:
        """One forward pass of the base over all rows."""
        self.rows = list(rows)
        self.head = base.module.get_parameter("lm_head.weight").detach().clone()
        self.states: list[Tensor] = [torch.empty(0)] * len(self.rows)
        for batch in batches(self.rows, range(len(self.rows)), base.device, batch_tokens):
            sizes = [len(self.rows[i].completion_ids) for i in batch.rows]
            for index, state in zip(batch.rows, torch.split(hidden_at(base, batch), sizes), strict=True):
                self.states[index] = state.clone()

    def kl(self, lm: LanguageModel, batch: Batch) -> Tensor:
        """KL(base || lm) at each target of the batch: [targets] nats, differentiable in ``lm``."""
        head, hidden = lm.module.get_submodule("lm_head"), hidden_at(lm, batch)
        states = torch.cat([self.states[i] for i in batch.rows])
        parts = zip(torch.split(states, LOGIT_ROWS), torch.split(hidden, LOGIT_ROWS), strict=True)
        return torch.cat([kl(self._logits(state), head(part)) for state, part in parts])

    @torch.no_grad()
    def log_likelihoods(self, index: int) -> list[float]:
        """The base's log-probability, nats, of each completion token of one row, given all before it."""
        logits = self._logits(self.states[index]).float()
        tokens = torch.tensor(self.rows[index].completion_ids, device=logits.device)
        chosen: list[float] = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        return chosen

    @torch.no_grad()
    def logits(self, indices: Sequence[int]) -> Tensor:
        """The base's logits at the completions of the given rows, one after the other: [tokens, vocabulary]."""
        return self._logits(torch.cat([self.states[i] for i in indices]))

    @torch.no_grad()
    def _logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self.head)

    @torch.no_grad()
    def drift(self, lm: LanguageModel, wanted: Sequence[int], *, batch_tokens: int = 4096) -> dict[int, float]:
        """Mean KL(base || lm) per token, nats, of the rows with the given indices (0 for an empty completion)."""
        drifts = dict.fromkeys(wanted, 0.0)
        used = [i for i in wanted if self.rows[i].completion_ids]
        for batch in batches(self.rows, used, lm.device, batch_tokens):
            sizes = [len(self.rows[i].completion_ids) for i in batch.rows]
            for index, values in zip(batch.rows, torch.split(self.kl(lm, batch), sizes), strict=True):
                drifts[index] = float(values.mean())
        return drifts


def row_losses(lm: LanguageModel, rows: Sequence[Row], batch: Batch, traces: BaseTraces, first: int) -> Tensor:
    """Each row's sum over its completion tokens, nats, float32 [rows of the batch]: cross-entropy for target rows,
    KL(base || lm) for the others.

    ``rows``: target rows, then from index ``first`` on the rows of ``traces``. One forward pass and one pair of output
    layers serve all kinds: every backward pass writes a gradient of the size of the model, so a step should hold few.
    """
    logits = lm.module.get_submodule("lm_head")(hidden_at(lm, batch))
    held = [i - first for i in batch.rows if i >= first]
    base = iter(torch.split(traces.logits(held), [len(traces.states[i]) for i in held]) if held else ())
    sizes = [len(rows[i].completion_ids) for i in batch.rows]
    parts = zip(batch.rows, torch.split(logits, sizes), torch.split(batch.targets, sizes), strict=True)
    return torch.stack(
        [  # row by row: what is computed in float32 then fits a CPU's cache
            F.cross_entropy(own.float(), targets, reduction="sum") if index < first else kl(next(base), own).sum()
            for index, own, targets in parts
        ]
    )
