"""A packed sequence computes what each row computes alone, forwards and backwards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trainer.model import LanguageModel, ModelError, load
from trainer.packed import forward, pack

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CPU = torch.device("cpu")


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen2() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def qwen3() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32))


def rows(seed: int, shared: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    front = torch.randint(50, (shared,), generator=generator).tolist()
    return [front + torch.randint(50, (n,), generator=generator).tolist() for n in (3, 9, 1, 5)]


@pytest.mark.parametrize("make", [llama, qwen2, qwen3])
@pytest.mark.parametrize("shared", [0, 1, 6])
def test_each_row_is_computed_as_if_alone(make: Any, shared: int) -> None:
    torch.manual_seed(4)
    module = make().eval()
    ids = rows(7, shared)
    lm: Any = SimpleNamespace(module=module)
    states = forward(lm, pack(ids, shared, CPU))
    alone = [module.model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ids]
    expected = torch.cat([alone[0][:shared], *(state[shared:] for state in alone)])
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    weights[:shared] = 0  # alone, every row would add its own gradient of the opening's outputs
    names = [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.embed_tokens.weight",
    ]
    parameters = [module.get_parameter(name) for name in names]
    separate = torch.autograd.grad((expected * weights).sum(), parameters)
    (states * weights).sum().backward()  # the embedding's gradient goes to .grad itself (trainer.fused)
    for name, parameter, other in zip(names, parameters, separate, strict=True):
        one = parameter.grad
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_model_attends_as_before_after_a_packed_pass(tiny_model: Path) -> None:
    lm: LanguageModel = load(tiny_model / "base.dat", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    before = lm.module(input_ids=ids).logits
    forward(lm, pack([[1, 2, 3], [1, 2, 9, 9]], 2, CPU))
    assert torch.equal(lm.module(input_ids=ids).logits, before)


def test_a_row_longer_than_the_window_is_refused() -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    lm: Any = SimpleNamespace(module=Qwen2ForCausalLM(config).eval())
    with pytest.raises(ModelError, match="rows of 9 tokens, but layers look back over 4"):
        forward(lm, pack([list(range(9)), [1, 2]], 0, CPU))


def test_ends_that_are_more_than_a_matrix_are_refused() -> None:
    module = llama()
    module.lm_head = torch.nn.Linear(64, 50, bias=True)
    lm: Any = SimpleNamespace(module=module, folder="a model")
    with pytest.raises(ModelError, match="a model: its output layer is not a plain matrix"):
        forward(lm, pack([[1, 2, 3]], 0, CPU))
    module = llama()
    module.model.embed_tokens = type("Scaled", (torch.nn.Embedding,), {})(50, 64)
    with pytest.raises(ModelError, match="its embedding is a Scaled"):
        forward(SimpleNamespace(module=module, folder="a model"), pack([[1, 2, 3]], 0, CPU))  # type: ignore[arg-type]
