"""Tiny Hugging Face checkpoints of each architecture: ``tiny_gguf.tiny`` saved by transformers, with a tokenizer.

write_hf(tmp_path / "hf", tiny("qwen3", tied=True), dtype=torch.bfloat16, shards="20KB")
"""

from pathlib import Path
from typing import Any

import torch
from tiny_gguf import TEMPLATE, TOKENS, letters


def write_tokenizer(folder: Path) -> None:
    """Save a byte-level BPE tokenizer of ``TOKENS`` with one merge, Qwen2's way of splitting text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from trainer.gguf_tokenizer import QWEN2_PATTERN

    vocabulary = {token: i for i, token in enumerate([*letters(), "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    assert [fast.convert_ids_to_tokens(i) for i in range(len(TOKENS))] == TOKENS


def write_hf(folder: Path, model: Any, *, dtype: torch.dtype = torch.float32, shards: str = "5GB") -> Path:
    """The folder of ``model`` in ``dtype``. ``model`` itself is left in that dtype."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    write_tokenizer(folder)
    return folder
