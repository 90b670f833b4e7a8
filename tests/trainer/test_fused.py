"""Losses and gradients of a model's two ends are those that autograd finds."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from trainer import fused
from trainer.fused import embed, head_loss


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("targets", "others"), [(20, 21), (0, 3), (5, 0)])
def test_the_head_gives_the_losses_and_gradients_of_autograd(targets: int, others: int) -> None:
    count, words = targets + others, 70
    hidden, head = drawn(count, 32, seed=1).requires_grad_(), drawn(words, 32, seed=2).requires_grad_()
    states, base_head = drawn(others, 32, seed=3), drawn(words, 32, seed=4)
    wanted = torch.randint(words, (targets,), generator=torch.Generator().manual_seed(5))
    share = drawn(count, seed=6).abs()

    total, losses = head_loss(hidden, head, share, targets=wanted, base_states=states, base_head=base_head)
    total.backward()
    found = hidden.grad, head.grad
    assert found[0] is not None
    assert found[1] is not None
    found = found[0].clone(), found[1].clone()

    hidden.grad = head.grad = None
    logits = hidden @ head.T
    base = (states @ base_head.T).log_softmax(-1)
    expected = torch.cat(
        [
            F.cross_entropy(logits[:targets], wanted, reduction="none"),
            (base.exp() * (base - logits[targets:].log_softmax(-1))).sum(-1),
        ]
    )
    (expected * share).sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, (expected * share).sum().detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], hidden.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], head.grad, rtol=1e-3, atol=1e-4)


def test_a_second_pass_adds_to_the_gradients_of_the_first() -> None:
    head, weight = drawn(40, 16, seed=1).requires_grad_(), drawn(40, 16, seed=2).requires_grad_()
    ids, wanted = torch.tensor([3, 7, 3, 39]), torch.tensor([1, 2, 2, 0])

    def run() -> None:
        nothing = torch.empty(0, 16)
        total, _ = head_loss(
            embed(ids, weight), head, torch.ones(4), targets=wanted, base_states=nothing, base_head=head.detach()
        )
        total.backward()

    run()
    assert head.grad is not None
    assert weight.grad is not None
    once = head.grad.clone(), weight.grad.clone()
    run()
    torch.testing.assert_close(head.grad, 2 * once[0])
    torch.testing.assert_close(weight.grad, 2 * once[1])
    assert sorted(weight.grad.abs().sum(1).nonzero().flatten().tolist()) == [3, 7, 39]


def test_an_embedding_is_the_one_of_torch_in_both_directions() -> None:
    weight = drawn(30, 16, seed=1).bfloat16().requires_grad_()
    ids = torch.randint(30, (400,), generator=torch.Generator().manual_seed(2))
    upstream = drawn(400, 16, seed=3).bfloat16()
    states = embed(ids, weight)
    assert torch.equal(states, weight.detach()[ids])
    states.backward(upstream)
    exact = torch.zeros(30, 16, dtype=torch.float64).index_add_(0, ids, upstream.double())
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, exact.bfloat16(), rtol=2**-8, atol=1e-6)


def test_what_asks_for_no_gradient_gets_none() -> None:
    head, weight = drawn(40, 16, seed=1), drawn(40, 16, seed=2)
    states = embed(torch.tensor([1, 2]), weight)
    total, _ = head_loss(
        states, head, torch.ones(2), targets=torch.tensor([1, 2]), base_states=states[:0], base_head=head
    )
    assert not total.requires_grad
    assert head.grad is None
    assert weight.grad is None


def test_where_gradients_are_off_none_is_left_behind() -> None:
    head, weight = drawn(40, 16, seed=1).requires_grad_(), drawn(40, 16, seed=2).requires_grad_()
    with torch.no_grad():
        states = embed(torch.tensor([1, 2]), weight)
        head_loss(states, head, torch.ones(2), targets=torch.tensor([1, 2]), base_states=states[:0], base_head=head)
    assert head.grad is None
    assert weight.grad is None


def test_a_head_may_learn_alone() -> None:
    hidden, head = drawn(3, 16, seed=1), drawn(40, 16, seed=2).requires_grad_()
    wanted = torch.tensor([1, 2, 3])
    total, _ = head_loss(hidden, head, torch.ones(3), targets=wanted, base_states=hidden[:0], base_head=head.detach())
    total.backward()
    expected = drawn(40, 16, seed=2).requires_grad_()
    F.cross_entropy(hidden @ expected.T, wanted, reduction="sum").backward()
    torch.testing.assert_close(head.grad, expected.grad, rtol=1e-3, atol=1e-4)


def test_scratch_memory_is_one_piece_for_each_use_and_grows() -> None:
    like = torch.empty(0)
    first = fused.scratch("test", (4, 5), like)
    assert fused.scratch("test", (2, 3), like).data_ptr() == first.data_ptr()
    assert fused.scratch("other", (2, 3), like).data_ptr() != first.data_ptr()
    assert fused.scratch("test", (50, 60), like).shape == (50, 60)
