"""What enters a 4-bit layer: against arithmetic by hand, and against a model written in numpy."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from trainer import generate as engine
from trainer.candidate import Candidate
from trainer.examples import Row
from trainer.fit import Fit, FitConfig
from trainer.generate import NonFiniteError, generate
from trainer.model import LanguageModel, ModelError, load
from trainer.numerics import NumericsError, W4A4Linear, numerics_of, other, seen_by, set_numerics
from trainer.nvfp4 import quantise_activations
from trainer.objective import BaseTraces
from trainer.packed import forward, pack

IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]])


@pytest.fixture
def lm(tiny_model: Path) -> LanguageModel:
    return load(tiny_model / "base.dat", dtype=torch.float32)


def logits(lm: LanguageModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return lm.module(input_ids=ids).logits.clone()


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 48, bias=False))


def test_by_hand() -> None:
    module = nn.Sequential(nn.Linear(16, 1, bias=False))
    nn.init.ones_(module[0].weight)
    set_numerics(module, ["0.weight"], "w4a4")
    x = torch.tensor([[6.0, 0.3, 0.2, -2.6, 5.2, -0.0, *[0.0] * 10]])
    # amax / 6 = 1: every value goes to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    assert module(x).item() == 6.0 + 0.5 + 0.0 - 3.0 + 6.0
    assert module(x / 2).item() == 4.75, "half of it: the scale is half, too"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_paired_layer_takes_quantised_activations_and_another_is_left_alone(dtype: torch.dtype) -> None:
    module = two_layers().to(dtype)
    x = torch.randn(3, 5, 32).to(dtype)
    first, second = module
    plain = F.linear(x, first.weight, first.bias)
    set_numerics(module, ["0.weight"], "w4a4")
    rounded = F.linear(quantise_activations(x), first.weight, first.bias)
    assert torch.equal(first(x), rounded)
    assert not torch.equal(rounded, plain)
    assert torch.equal(second(rounded), F.linear(rounded, second.weight)), "not a pair in the file"
    assert type(second) is nn.Linear
    assert torch.equal(seen_by(first, x), quantise_activations(x))
    assert seen_by(second, rounded) is rounded


def test_embeddings_are_left_alone_and_what_is_not_known_is_refused() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(8, 16), "line": nn.Linear(16, 16), "odd": nn.Bilinear(16, 16, 2)})
    set_numerics(module, ["embed.weight"], "w4a4")
    assert type(module["embed"]) is nn.Embedding
    with pytest.raises(NumericsError, match=r"odd\.weight is a 4-bit weight of a Bilinear"):
        set_numerics(module, ["line.weight", "odd.weight"], "weights")
    with pytest.raises(NumericsError, match="numerics 'w4a8': choose weights or w4a4"):
        set_numerics(module, ["line.weight"], "w4a8")  # type: ignore[arg-type]
    assert (numerics_of(module), type(module["line"])) == ("w4a4", nn.Linear), "a refusal changes nothing"
    assert (other("weights"), other("w4a4")) == ("w4a4", "weights")


def test_there_and_back_again(lm: LanguageModel) -> None:
    assert lm.numerics == "weights"
    assert "lm_head.weight" in lm.paired
    assert "model.norm.weight" not in lm.paired
    before = logits(lm)
    lm.use("w4a4")
    lm.use("w4a4")
    rounded = logits(lm)
    assert lm.numerics == "w4a4"
    assert not torch.equal(rounded, before)
    lm.use("weights")
    assert lm.numerics == "weights"
    assert torch.equal(logits(lm), before)
    assert torch.equal(logits(load(lm.path, dtype=torch.float32, numerics="w4a4")), rounded)
    with pytest.raises(ModelError, match=r"base\.dat: numerics 'x': choose weights or w4a4"):
        lm.use("x")  # type: ignore[arg-type]


def test_a_copy_keeps_its_numerics_and_shares_none(lm: LanguageModel) -> None:
    lm.use("w4a4")
    twin = dataclasses.replace(lm, module=copy.deepcopy(lm.module))
    lm.use("weights")
    assert (lm.numerics, twin.numerics) == ("weights", "w4a4")
    assert type(twin.module.get_submodule("lm_head")) is W4A4Linear
    assert not torch.equal(logits(lm), logits(twin))


def test_a_file_without_pairs_is_the_same_in_both(lm: LanguageModel) -> None:
    raw = dataclasses.replace(lm, paired=frozenset())
    before = logits(raw)
    raw.use("w4a4")
    assert torch.equal(logits(raw), before)


LEVELS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = np.array([(8 + m) / 8 * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6 for e in range(16) for m in range(8)][:127])


def nearest(values: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The grid's nearest point, of two equally near ones that with the even index."""
    high = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    middle = (grid[high - 1] + grid[high]) / 2
    up = (values > middle) | ((values == middle) & (high % 2 == 0))
    return grid[np.where(up, high, high - 1)]


def rounded(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Activations in NVFP4, written from the format's description alone."""
    blocks = x.reshape(-1, 16)
    scale = np.maximum(nearest((np.abs(blocks).max(1) / 6).clip(max=448), E4M3), 2.0**-9)[:, None]
    return (np.sign(blocks) * nearest(np.abs(blocks / scale).clip(max=6), LEVELS) * scale).reshape(x.shape)


def reference(lm: LanguageModel, ids: list[int], *, quantised: bool) -> NDArray[np.float64]:
    """Logits of a small llama in float64, without torch's layers."""
    w = {name: p.detach().double().numpy() for name, p in lm.module.named_parameters()}
    heads, groups, eps = lm.config.num_attention_heads, lm.config.num_key_value_heads, lm.config.rms_norm_eps
    hidden = lm.config.hidden_size
    size = hidden // heads

    def line(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return np.asarray((rounded(x) if quantised else x) @ w[name + ".weight"].T)

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name + ".weight"])

    def turned(x: NDArray[np.float64]) -> NDArray[np.float64]:
        angle = np.outer(np.arange(len(ids)), 10000.0 ** (-np.arange(0, size, 2) / size))
        cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))
        return np.asarray(x * cos + np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin)

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(lm.config.num_hidden_layers):
        at = f"model.layers.{layer}."
        n = norm(x, at + "input_layernorm")
        q, k, v = (
            line(n, f"{at}self_attn.{part}_proj").reshape(len(ids), count, size)
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = turned(q), turned(k)
        k, v = (np.repeat(part, heads // groups, 1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(size)
        scores[:, np.triu(np.ones((len(ids), len(ids)), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + line(np.einsum("hij,jhd->ihd", p, v).reshape(len(ids), hidden), f"{at}self_attn.o_proj")
        n = norm(x, at + "post_attention_layernorm")
        gate = line(n, at + "mlp.gate_proj")
        x = x + line(gate / (1 + np.exp(-gate)) * line(n, at + "mlp.up_proj"), at + "mlp.down_proj")
    return line(norm(x, "model.norm"), "lm_head")


def test_a_whole_model_is_the_reference_in_numpy(lm: LanguageModel) -> None:
    """A rounding boundary may fall between float64 and float32: so in double precision the two are one, and in float32
    they are near."""
    ids = IDS[0].tolist()
    for numerics, quantised in (("weights", False), ("w4a4", True)):
        lm.use(numerics)  # type: ignore[arg-type]
        want = reference(lm, ids, quantised=quantised)
        got = logits(lm)[0].double().numpy()
        assert np.abs(got - want).max() < 1e-3 * np.abs(want).max(), numerics
    plain = reference(lm, ids, quantised=False)
    assert np.abs(want - plain).max() > 0.05 * np.abs(plain).max(), "and the two numerics are far apart"


def test_decoding_honours_it_token_by_token(lm: LanguageModel) -> None:
    """Prefill, shared prefix, cached steps and a batch of several give what one whole forward pass gives."""
    lm.use("w4a4")
    texts = [lm.render(prompt) for prompt in ("Who are you now?", "Who is it", "Who?")]
    assert engine.shared_prefix([lm.encode(text) for text in texts]) >= engine.SHORTEST_PREFIX
    replies = generate(lm, texts, max_tokens=6)
    assert replies != generate(dataclasses.replace(lm, module=fresh(lm)), texts, max_tokens=6)
    for text, reply in zip(texts, replies, strict=True):
        ids = lm.encode(text)
        for token, margin in zip(reply.tokens, reply.margins, strict=False):
            top = logits(lm, torch.tensor([ids]))[0, -1].topk(2)
            assert int(top.indices[0]) == token
            assert float(top.values[0] - top.values[1]) == pytest.approx(margin, abs=1e-3)
            ids.append(token)


def fresh(lm: LanguageModel) -> nn.Module:
    return load(lm.path, dtype=torch.float32).module


def test_infinite_activations_are_told(lm: LanguageModel) -> None:
    lm.use("w4a4")
    with torch.no_grad():
        lm.module.get_parameter("model.norm.weight")[3] = float("inf")
    with pytest.raises(NonFiniteError):
        generate(lm, [lm.render("x")], max_tokens=2)


def row(lm: LanguageModel, kind: Any, prompt: str, completion: str) -> Row:
    ids, said = tuple(lm.encode(lm.render(prompt))), tuple(lm.encode(completion))
    return Row(kind=kind, prompt=prompt, prompt_ids=ids, completion_ids=said)


def test_packed_rows_and_traces_pass_the_output_layer_in_the_same_numerics(lm: LanguageModel) -> None:
    lm.use("w4a4")
    ids = IDS[0].tolist()
    states = forward(lm, pack([ids], 0, torch.device("cpu")))
    head = lm.module.get_submodule("lm_head")
    torch.testing.assert_close(head(states), logits(lm)[0], rtol=1e-3, atol=1e-3)
    rows = [row(lm, "replay", "Hello", "abc"), row(lm, "replay", "Bye", "xyzw")]
    traces = BaseTraces(lm, rows)
    assert all(torch.equal(state, quantise_activations(state)) for state in traces.states), "as the head takes them"
    assert traces.drift(lm, [0, 1]) == pytest.approx({0: 0.0, 1: 0.0}, abs=1e-6)
    before = traces.log_likelihoods(0)
    whole = list(rows[0].prompt_ids) + list(rows[0].completion_ids)
    log_p = logits(lm, torch.tensor([whole]))[0].log_softmax(-1)
    start = len(rows[0].prompt_ids)
    expected = [float(log_p[start + i - 1, token]) for i, token in enumerate(rows[0].completion_ids)]
    assert before == pytest.approx(expected, abs=1e-3)
    lm.use("weights")
    assert traces.drift(lm, [0])[0] > 1e-3, "and the other numerics are not mistaken for the model's own"


def test_training_sees_what_evaluation_sees(lm: LanguageModel) -> None:
    """The loss of a step at the base's own replies is zero in the same numerics: the fused output layer honours it."""
    lm.use("w4a4")
    traces = BaseTraces(lm, [row(lm, "contrast", "Hello", "abc")])
    twin = dataclasses.replace(lm, module=copy.deepcopy(lm.module))
    candidate = Candidate(twin, seed=0)
    candidate.refresh()
    fit = Fit(candidate, [row(lm, "target", "Who", "ab")], traces, FitConfig(target_rows=1, contrast_rows=1), seed=0)
    first = fit.step()
    assert first.contrast == pytest.approx(0.0, abs=1e-5)
    assert first.gradient_norm > 0
    assert candidate.lm.numerics == "w4a4"
