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
from trainer.fused import head_loss
from trainer.model import LanguageModel
from trainer.numerics import seen_by
from trainer.packed import forward

LOGIT_ROWS = 128
"""Positions whose logits the drift is computed from at a time. Whole, they are the largest tensors of an evaluation
(vocabulary x 4 bytes x positions), which a CPU's allocator maps and unmaps anew for each of a dozen operations."""


def hidden_at(lm: LanguageModel, batch: Batch) -> Tensor:
    """Last hidden states [targets, features] at the places that predict the batch's targets."""
    return forward(lm, batch.pack).index_select(0, batch.where)


def kl(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(base || candidate) in nats for each position: [n] float32 from two [n, vocabulary] of logits."""
    base, candidate = base_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (base.exp() * (base - candidate)).sum(-1)


class BaseTraces:
    """The base's last hidden states at the completions of ``rows``, and its output layer.

    The states are kept as the output layer takes them in the base's numerics of that moment.
    """

    @torch.no_grad()
    def __init__(self, base: LanguageModel, rows: Sequence[Row], *, batch_tokens: int = 4096) -> None:
        """One forward pass of the base over all rows. The output layer is the base's own, not a copy."""
        self.rows = list(rows)
        self.head = base.module.get_parameter("lm_head.weight").detach()
        self.states: list[Tensor] = [self.head[:0]] * len(self.rows)
        used = [i for i, row in enumerate(self.rows) if row.completion_ids]
        for batch in batches(self.rows, used, base.device, batch_tokens):
            sizes = [len(self.rows[i].completion_ids) for i in batch.rows]
            hidden = seen_by(base.module.get_submodule("lm_head"), hidden_at(base, batch))
            for index, state in zip(batch.rows, torch.split(hidden, sizes), strict=True):
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


def weighted_losses(
    lm: LanguageModel, rows: Sequence[Row], batch: Batch, traces: BaseTraces, first: int, weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(what to call ``backward`` on, each row's loss): float32 [] and [rows of the batch].

    A row's loss is the sum over its completion tokens, nats: cross-entropy for target rows, KL(base || lm) for the
    others; ``weights``, one for each row of the batch, is what each counts. ``rows``: target rows, then from index
    ``first`` on the rows of ``traces``. One forward pass and one output layer serve all kinds: every backward pass
    writes a gradient of the size of the model, so a step should hold few. The output layer's gradient is complete when
    this returns (`trainer.fused`): `backward` must follow, on the sum as it is.
    """
    sizes = torch.tensor([len(rows[i].completion_ids) for i in batch.rows], device=lm.device)
    owner = torch.arange(len(sizes), device=lm.device).repeat_interleave(sizes)
    held = torch.tensor([i >= first for i in batch.rows], device=lm.device)[owner]
    order = held.long().argsort(stable=True)  # positions of target rows first
    owner, targets = owner[order], batch.targets[order][: int((~held).sum())]
    states = [traces.states[i - first] for i in batch.rows if i >= first]
    head = lm.module.get_parameter("lm_head.weight")
    hidden = seen_by(lm.module.get_submodule("lm_head"), hidden_at(lm, batch))[order]
    total, losses = head_loss(
        hidden,
        head,
        torch.tensor(weights, dtype=torch.float32, device=lm.device)[owner],
        targets=targets,
        base_states=torch.cat(states) if states else hidden.new_empty(0, hidden.shape[1]),
        base_head=traces.head,
    )
    return total, losses.new_zeros(len(sizes)).index_add_(0, owner, losses)
