"""Tiny GGUF checkpoints of each architecture, written by a converter of the tests' own.

    write_gguf(path, tiny("llama", tied=True))

The weights lie on the NVFP4 grid (every block has a 6 times its scale), so that importing loses nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def letters() -> list[str]:
    """The byte alphabet of byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


TOKENS = [*letters(), "ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def on_grid(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random NVFP4 values: levels x scales, with one level 6 a block of 16, so that the scale can be told from them."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[torch.randint(0, 8, shape, generator=generator)]
    levels = levels * torch.where(torch.rand(shape, generator=generator) < 0.5, -1, 1)
    levels = levels.reshape(-1, 16)
    levels[:, 3] = 6
    scales = torch.tensor([0.03125, 0.046875, 0.0625])[torch.randint(0, 3, (len(levels), 1), generator=generator)]
    return (levels * scales).reshape(shape)


def tiny(architecture: str, *, tied: bool, head: int = HIDDEN // HEADS) -> Any:
    """A model of random numbers whose weights survive NVFP4 and float16 unchanged."""
    config_type, model_type = MODELS[architecture]
    config = config_type(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        head_dim=head,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        bos_token_id=TOKENS.index("<|im_start|>"),
        eos_token_id=TOKENS.index("<|im_end|>"),
        tie_word_embeddings=tied,
    )
    model = model_type(config).eval()
    generator = torch.Generator().manual_seed(len(architecture) + tied)
    with torch.no_grad():
        for parameter in model.parameters():
            shape = tuple(parameter.shape)
            values = on_grid(shape, generator) if len(shape) == 2 else 1 + torch.randn(shape, generator=generator) / 8
            parameter.copy_(values.half().float())
    return model


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's row order of a rotary weight, row by row: a head's first half and second half take turns."""
    size = weight.shape[0] // heads
    order = [h * size + i + half * (size // 2) for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(path: Path, model: Any, *, change: Callable[[gguf.GGUFWriter], None] = lambda _: None) -> Path:
    """The checkpoint of ``model`` as llama.cpp's converter would lay it out, in float32."""
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head = model.model.layers[0].self_attn.head_dim
    if architecture == "llama":
        writer.add_rope_dimension_count(head)
    else:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template(TEMPLATE)
    change(writer)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and "q_proj" in name:
            value = interleaved(value, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            value = interleaved(value, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    owner, leaf = name.rsplit(".", 1)
    if owner in whole:
        return f"{whole[owner]}.{leaf}"
    _, _, layer, part = owner.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{leaf}"
