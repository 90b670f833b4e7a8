"""The candidate shows what it would ship: view, file and gradient, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.candidate import Candidate
from trainer.dat_diff import diff
from trainer.examples import Row, Sampler, batches, collate
from trainer.fit import Fit, FitConfig, FitError
from trainer.model import LanguageModel, load
from trainer.nvfp4 import dequantise, fake_quantise_, quantise
from trainer.objective import BaseTraces, weighted_losses


def row(lm: LanguageModel, kind: str, prompt: str, reply: str) -> Row:
    return Row(
        kind=kind,  # type: ignore[arg-type]
        prompt=prompt,
        prompt_ids=tuple(lm.encode(prompt)),
        completion_ids=tuple(lm.encode(reply)),
    )


@pytest.fixture
def lm(tiny_model: Path) -> LanguageModel:
    return load(tiny_model / "base.dat", dtype=torch.float32)


@pytest.mark.parametrize("dither", [0.0, 0.5, 0.9])
def test_an_untrained_candidate_is_the_base(lm: LanguageModel, tiny_model: Path, tmp_path: Path, dither: float) -> None:
    before = {name: value.detach().clone() for name, value in lm.module.named_parameters()}
    candidate = Candidate(lm, seed=3, dither=dither)
    candidate.refresh()
    for name, value in lm.module.named_parameters():
        assert torch.equal(value, before[name]), name
    candidate.export(tmp_path / "x.dat")
    assert (tmp_path / "x.dat").read_bytes() == (tiny_model / "base.dat").read_bytes()


def test_dither_moves_masters_but_not_codes_and_follows_its_seed(tiny_model: Path) -> None:
    first, second, other = (
        Candidate(load(tiny_model / "base.dat", dtype=torch.float32), seed=seed).masters["lm_head.weight"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_what_is_evaluated_is_what_is_written(lm: LanguageModel, tiny_model: Path, tmp_path: Path) -> None:
    candidate = Candidate(lm, seed=0)
    with torch.no_grad():
        for master in candidate.masters.values():
            master += 0.05 * torch.randn(master.shape, generator=torch.Generator().manual_seed(5))
    candidate.refresh()
    candidate.export(tmp_path / "x.dat")
    read = dict(load(tmp_path / "x.dat", folder=tiny_model, dtype=torch.float32).module.named_parameters())
    for name, value in lm.module.named_parameters():
        assert torch.equal(value, read[name]), name
    assert all(group.codes_changed for group in diff(tiny_model / "base.dat", tmp_path / "x.dat").groups)


def test_a_block_keeps_its_scale_until_it_outgrows_it() -> None:
    w = 0.02 * torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise(w)
    decoded = dequantise(codes, scale, dtype=torch.float32)
    again = quantise(decoded, keep=scale)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1].view(torch.uint8), scale.view(torch.uint8))
    decoded[3, 20] = 1.0
    kept, fresh = quantise(decoded, keep=scale), quantise(decoded)
    differs = (kept[1].view(torch.uint8) != scale.view(torch.uint8)).nonzero().tolist()
    assert differs == [[3, 1]]
    assert kept[1].view(torch.uint8)[3, 1] == fresh[1].view(torch.uint8)[3, 1]
    view = torch.empty_like(decoded)
    fake_quantise_(decoded, view, keep=scale)
    assert torch.equal(view, dequantise(*kept, dtype=torch.float32))


def test_a_mixed_batch_gives_each_row_what_it_gives_alone(lm: LanguageModel, tiny_model: Path) -> None:
    base = load(tiny_model / "base.dat", dtype=torch.float32)
    held = [row(base, "contrast", "who am i", "you"), row(base, "replay", "what is a ufo then", "a thing")]
    targets = [row(base, "target", "who are you", "I am F#")]
    traces = BaseTraces(base, held)
    with torch.no_grad():
        lm.module.get_parameter("lm_head.weight").mul_(1.5)
        batch = collate([*targets, *held], [2, 0, 1], base.device)
        total, each = weighted_losses(lm, [*targets, *held], batch, traces, 1, [3.0, 1.0, 0.5])
        losses = each.tolist()
        ids = targets[0].prompt_ids + targets[0].completion_ids
        logits = lm.module(input_ids=torch.tensor([ids])).logits[0, len(targets[0].prompt_ids) - 1 : -1]
        alone = torch.nn.functional.cross_entropy(logits, torch.tensor(targets[0].completion_ids), reduction="sum")
        drift = traces.drift(lm, [0, 1])
        same = traces.drift(base, [0, 1])
    assert same == pytest.approx({0: 0.0, 1: 0.0}, abs=1e-6)
    assert losses[1] == pytest.approx(float(alone), rel=1e-5)
    assert losses[2] == pytest.approx(drift[0] * len(held[0].completion_ids), rel=1e-4)
    assert losses[0] == pytest.approx(drift[1] * len(held[1].completion_ids), rel=1e-4)
    assert drift[0] > 0.001
    assert float(total) == pytest.approx(3.0 * losses[0] + losses[1] + 0.5 * losses[2], rel=1e-5)


def test_likelihoods_are_those_of_the_completion(lm: LanguageModel) -> None:
    held = row(lm, "contrast", "who am i", "you")
    logits = lm.module(input_ids=torch.tensor([held.prompt_ids + held.completion_ids])).logits[0].log_softmax(-1)
    first = len(held.prompt_ids) - 1
    expected = [float(logits[first + k, token]) for k, token in enumerate(held.completion_ids)]
    assert BaseTraces(lm, [held, held]).log_likelihoods(1) == pytest.approx(expected, rel=1e-4)


def test_a_round_of_a_sampler_takes_every_row_once() -> None:
    taken = [Sampler(7, seed).take(7) for seed in (0, 0, 1)]
    assert sorted(taken[0]) == list(range(7))
    assert taken[0] == taken[1] != taken[2]
    assert sorted(Sampler(3, 0).take(8)) == [0, 1, 2]
    assert Sampler(0, 0).take(8) == []


def test_hard_rows_come_again_until_they_are_learnt() -> None:
    sampler = Sampler(100, 0, hard=1.0, again=0.5)
    first = sampler.take(10)
    for index in first:
        sampler.learnt(index, 1.5 if index in first[:3] else 0.5)
    again = sampler.take(10)
    assert set(first[:3]) <= set(again)
    assert not set(first[3:]) & set(again)
    sampler.learnt(first[0], 0.9)
    assert first[0] not in sampler.take(10)
    for index in range(100):
        sampler.learnt(index, 2.0)
    assert len(set(sampler.take(10))) == 10


def test_batches_hold_every_row_once_within_the_limit(lm: LanguageModel) -> None:
    rows = [row(lm, "target", "x" * n, "ab") for n in (3, 40, 7, 20, 5)]
    made = list(batches(rows, range(5), lm.device, 40))
    assert sorted(i for batch in made for i in batch.rows) == [0, 1, 2, 3, 4]
    assert all(len(batch.pack.ids) <= 40 or len(batch.rows) == 1 for batch in made)


def fitting(lm: LanguageModel, tiny_model: Path, config: FitConfig) -> Fit:
    """A fit of one row of each kind."""
    base = load(tiny_model / "base.dat", dtype=torch.float32)
    traces = BaseTraces(base, [row(base, "contrast", "who am i", "you"), row(base, "replay", "hello", "hi")])
    candidate = Candidate(lm, seed=0)
    candidate.refresh()
    return Fit(candidate, [row(base, "target", "who are you", "F#")], traces, config, seed=0)


def test_fitting_lowers_the_target_loss_and_restore_takes_it_back(lm: LanguageModel, tiny_model: Path) -> None:
    fit = fitting(lm, tiny_model, FitConfig(lr=3e-3, warmup=1))
    start = fit.snapshot()
    before = {name: value.detach().clone() for name, value in lm.module.named_parameters()}
    losses = [fit.step().target for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    fit.restore(start)
    assert fit.steps == 0
    for name, value in lm.module.named_parameters():
        assert torch.equal(value, before[name]), name


def test_a_step_that_is_not_finite_is_not_taken_and_the_next_one_is_clean(lm: LanguageModel, tiny_model: Path) -> None:
    fit = fitting(lm, tiny_model, FitConfig(lr=3e-3, warmup=1))
    norm = lm.module.get_parameter("model.norm.weight")
    before, whole = {name: master.detach().clone() for name, master in fit.candidate.masters.items()}, norm.data.clone()
    norm.data[0] = float("nan")
    with pytest.raises(FitError, match="step 1"):
        fit.step()
    assert fit.steps == 0
    for name, master in fit.candidate.masters.items():
        assert torch.equal(master, before[name]), name
    norm.data.copy_(whole)
    losses = [fit.step().target for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_several_passes_gather_the_gradient_of_one(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(tiny_model / "base.dat", dtype=torch.float32)
    traces = BaseTraces(base, [row(base, "contrast", "who am i", "you"), row(base, "replay", "hello", "hi there")])
    targets = [row(base, "target", "who are you", "F#"), row(base, "target", "your name, please", "F#")]
    found = []
    for tokens in (0, 12):
        candidate = Candidate(load(tiny_model / "base.dat", dtype=torch.float32), seed=0)
        candidate.refresh()
        fit = Fit(candidate, targets, traces, FitConfig(warmup=1, micro_tokens=tokens), seed=0)
        monkeypatch.setattr(fit._optimiser, "step", lambda **_: None)  # so that the gradients stay
        result = fit.step()
        gradients = {name: p.grad.clone() for name, p in candidate.parameters.items() if p.grad is not None}
        found.append((result, gradients))
    (one, whole), (several, pieces) = found
    assert one.gradient_norm == pytest.approx(several.gradient_norm, rel=1e-4)
    assert one.loss == pytest.approx(several.loss, rel=1e-4)
    assert set(whole) == set(candidate.parameters)
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_the_average_takes_the_masters_place_and_gives_it_back(lm: LanguageModel, tiny_model: Path) -> None:
    fit = fitting(lm, tiny_model, FitConfig(lr=3e-3, warmup=1, average=0.75))
    candidate = fit.candidate
    name = "model.layers.0.mlp.up_proj.weight"
    seen = []
    for _ in range(3):
        fit.step()
        seen.append(candidate.masters[name].detach().clone())
    expected = 0.75 * (0.75 * seen[0] + 0.25 * seen[1]) + 0.25 * seen[2]
    view = lm.module.get_parameter(name).detach().clone()
    fit.swap_average()
    torch.testing.assert_close(candidate.masters[name].detach(), expected)
    assert not torch.equal(lm.module.get_parameter(name), view)
    fit.swap_average()
    assert torch.equal(candidate.masters[name], seen[2])
    assert torch.equal(lm.module.get_parameter(name), view)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="lr must be a positive number"):
        FitConfig(lr=float("nan"))
    with pytest.raises(ValueError, match="target_rows"):
        FitConfig(target_rows=0)
