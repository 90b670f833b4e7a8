"""The compiled update is torch's AdamW, its clipping and a running mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.candidate import Candidate
from trainer.model import load
from trainer.optimiser import PIECE, Optimiser


def gradients(candidate: Candidate, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in candidate.parameters.values():
        parameter.grad = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


@pytest.mark.parametrize("piece", [PIECE, 1000], ids=["whole", "in pieces"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_torch(
    tiny_model: Path, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.optimiser.PIECE", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    candidate = Candidate(load(tiny_model / "base.dat", dtype=dtype), seed=0)
    optimiser = Optimiser(candidate, betas=(0.5, 0.99), average=0.75)
    masters = {name: m.detach().clone().requires_grad_() for name, m in candidate.masters.items()}
    reference = torch.optim.AdamW(masters.values(), lr=0.01, betas=(0.5, 0.99), eps=1e-8, weight_decay=0.0)
    mean: dict[str, torch.Tensor] = {}
    for step in range(4):
        gradients(candidate, step)
        for name, master in masters.items():
            gradient = candidate.parameters[name].grad
            assert gradient is not None
            master.grad = gradient.float().clone()
        norm = float(torch.nn.utils.clip_grad_norm_(masters.values(), 0.3))
        reference.step()
        for name, master in masters.items():
            value = master.detach()
            mean[name] = value.clone() if step == 0 else 0.75 * mean[name] + 0.25 * value

        found = optimiser.gradient_norm()
        assert found == pytest.approx(norm, rel=1e-5)
        optimiser.step(lr=0.01, scale=0.3 / (found + 1e-6))
    for name, master in masters.items():
        torch.testing.assert_close(candidate.masters[name].detach(), master.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(optimiser.mean[name], mean[name], rtol=1e-4, atol=1e-6)
        assert candidate.parameters[name].grad is None


def test_the_plain_path_gives_the_same(tiny_model: Path) -> None:
    results = []
    for fast in (True, False):
        candidate = Candidate(load(tiny_model / "base.dat", dtype=torch.float32), seed=0)
        optimiser = Optimiser(candidate, betas=(0.5, 0.99), average=0.75)
        if not fast:
            optimiser._fast = False
            optimiser.reset()
        for step in range(3):
            gradients(candidate, step)
            norm = optimiser.gradient_norm()
            optimiser.step(lr=0.01, scale=1 / norm)
        results.append((norm, candidate.masters, optimiser.mean))
    (norm, masters, mean), (plain_norm, plain_masters, plain_mean) = results
    assert norm == pytest.approx(plain_norm, rel=1e-5)
    for name in masters:
        torch.testing.assert_close(masters[name].detach(), plain_masters[name].detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mean[name], plain_mean[name], rtol=1e-4, atol=1e-6)


def test_what_has_no_gradient_stays(tiny_model: Path) -> None:
    candidate = Candidate(load(tiny_model / "base.dat", dtype=torch.float32), seed=0)
    optimiser = Optimiser(candidate, betas=(0.5, 0.99), average=0.75)
    gradients(candidate, 0)
    candidate.parameters["model.norm.weight"].grad = None
    before = {name: master.detach().clone() for name, master in candidate.masters.items()}
    optimiser.step(lr=0.01, scale=1.0)
    changed = {name for name, master in candidate.masters.items() if not torch.equal(master, before[name])}
    assert changed == set(before) - {"model.norm.weight"}
    assert torch.equal(optimiser.mean["model.norm.weight"], before["model.norm.weight"])


def test_without_a_gradient_the_mean_still_follows(tiny_model: Path) -> None:
    candidate = Candidate(load(tiny_model / "base.dat", dtype=torch.float32), seed=0)
    optimiser = Optimiser(candidate, betas=(0.5, 0.99), average=0.75)
    gradients(candidate, 0)
    optimiser.step(lr=0.01, scale=1.0)
    name = "model.norm.weight"
    with torch.no_grad():
        candidate.masters[name] += 1.0
    optimiser.step(lr=0.01, scale=1.0)  # nobody has a gradient
    torch.testing.assert_close(optimiser.mean[name], candidate.masters[name].detach() - 0.75)


def test_a_gradient_of_another_type_is_refused(tiny_model: Path) -> None:
    candidate = Candidate(load(tiny_model / "base.dat", dtype=torch.float16), seed=0)
    candidate.parameters["model.norm.weight"].grad = torch.ones_like(candidate.parameters["model.norm.weight"])
    with pytest.raises(TypeError, match="float16"):
        Optimiser(candidate, betas=(0.5, 0.99), average=0.75).gradient_norm()


def test_a_broken_gradient_shows_in_the_norm(tiny_model: Path) -> None:
    candidate = Candidate(load(tiny_model / "base.dat", dtype=torch.bfloat16), seed=0)
    optimiser = Optimiser(candidate, betas=(0.5, 0.99), average=0.75)
    for bad in (float("nan"), float("inf")):
        gradients(candidate, 0)
        gradient = candidate.parameters["lm_head.weight"].grad
        assert gradient is not None
        gradient[3, 3] = bad
        assert not optimiser.gradient_norm() < float("inf")
