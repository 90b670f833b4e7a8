"""Exported GGUF files: what the gguf library reads from them is the file's own weights, fields and tokens."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_dat_base import write_dat
from test_export_hf import IDS, model_folder
from tiny_gguf import MODELS, TEMPLATE, TOKENS, interleaved, tiny
from tiny_hf import write_hf as write_checkpoint

from trainer.export_gguf import rows_interleaved, write_gguf
from trainer.gguf_base import open_gguf, read_weights
from trainer.gguf_tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, splitter, tokens
from trainer.importer import import_model
from trainer.model import load, parameter_shapes
from trainer.transfer import TransferError

PROMPTS = ["cab", "你好，你是誰？", "<|im_start|>user\nab 123's\r\n  x<|im_end|>"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("architecture", MODELS)
def test_an_exported_file_comes_back_as_the_same_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    folder = model_folder(tmp_path, architecture, tied=tied)
    write_gguf(folder / "base.dat", folder, tmp_path / "x.gguf")
    back = import_model(str(tmp_path / "x.gguf"), tmp_path / "back")
    first, second = load(folder / "base.dat", dtype=torch.float32), load(back / "base.dat", dtype=torch.float32)
    written = dict(read_weights(open_gguf(tmp_path / "x.gguf"), first.config, parameter_shapes(first.config)))
    for name, value in first.module.named_parameters():
        assert torch.equal(value, written[name]), name
    with torch.no_grad():  # quantised again, a block in ten thousand may get another scale: near, not equal
        a, b = first.module(IDS).logits, second.module(IDS).logits
    assert (a - b).norm() < 0.01 * a.norm()
    assert second.tokenizer.chat_template == TEMPLATE
    assert second.stop_ids == first.stop_ids
    if architecture == "llama":  # transformers' reader gives every llama GPT-2's splitter, whatever the file names
        return
    assert [second.encode(text) for text in PROMPTS] == [first.encode(text) for text in PROMPTS]


def test_fields_and_types_are_what_llama_cpp_looks_for(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "qwen2", tied=True)
    write_gguf(folder / "base.dat", folder, tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen2"
    assert fields["qwen2.attention.head_count_kv"] == 2
    assert fields["qwen2.rope.freq_base"] == 5000
    assert fields["qwen2.attention.key_length"] == 16
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.tokens"] == TOKENS
    assert fields["tokenizer.ggml.token_type"][-4:] == [1, 3, 3, 3]
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.eos_token_id"] == TOKENS.index("<|im_end|>")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "BF16"
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == "F16"
    assert kinds["output.weight"] == "BF16"


def test_a_head_that_is_the_embedding_is_left_out(tmp_path: Path) -> None:
    model = tiny("llama", tied=True)
    source = write_checkpoint(tmp_path / "hf", model)
    file = write_dat(tmp_path / "x.dat", dict(model.state_dict()))
    write_gguf(file, source, tmp_path / "x.gguf")
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}


def test_rows_take_turns_as_llama_cpp_has_them() -> None:
    weight = torch.arange(64 * 3).reshape(64, 3)
    assert torch.equal(rows_interleaved(weight, 4), interleaved(weight, 4))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}, "'linear'"),
        ("qwen2", {"use_sliding_window": True}, "sliding window"),
        ("qwen3", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"model_type": "phi3"}, "architecture 'phi3' is not supported; supported: llama, qwen2, qwen3"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], said: str
) -> None:
    folder = model_folder(tmp_path, architecture, tied=True)
    edit(folder / "config.json", **changes)
    with pytest.raises(TransferError, match=rf"config\.json: .*{said}"):
        write_gguf(folder / "base.dat", folder, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def split_by(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (LEVEL, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, LEVEL]}, "smollm"),
        (split_by(QWEN2_PATTERN), "qwen2"),
        (split_by(LLAMA3_PATTERN), "llama-bpe"),
        (split_by(QWEN2_PATTERN + "|x"), None),
        ({"type": "Sequence", "pretokenizers": [DIGITS | {"individual_digits": False}, LEVEL]}, None),
        ({"type": "Metaspace"}, None),
        (LEVEL | {"add_prefix_space": True}, None),
        (None, None),
    ],
)
def test_a_splitter_has_its_name_or_is_refused(before: Any, name: str | None) -> None:
    plain = {"model": {"type": "BPE"}, "pre_tokenizer": before, "normalizer": {"type": "NFC"}}
    if name:
        assert splitter(Path("tokenizer.json"), plain) == name
        return
    with pytest.raises(TransferError, match=r"^tokenizer\.json: text is split in a way that has no name in GGUF"):
        splitter(Path("tokenizer.json"), plain)


@pytest.mark.parametrize("model", [{"type": "Unigram"}, {"type": "BPE", "byte_fallback": True}, None])
def test_another_kind_of_tokenizer_is_refused(model: Any) -> None:
    with pytest.raises(TransferError, match="only byte-level BPE"):
        splitter(Path("tokenizer.json"), {"model": model, "pre_tokenizer": LEVEL})


def test_ids_without_a_token_are_unused_ones_and_ids_beyond_are_refused() -> None:
    plain = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<x>", "id": 2, "special": False}]}
    assert tokens(Path("t"), plain, 4) == (["a", "[PAD1]", "<x>", "[PAD3]"], [1, 5, 4, 5])
    with pytest.raises(TransferError, match=r"token '<x>' has id 2, config\.json has 2 ids"):
        tokens(Path("t"), plain, 2)


def test_what_llama_cpp_cannot_load_is_refused(tmp_path: Path) -> None:
    model = tiny("qwen2", tied=True, head=32)
    source = write_checkpoint(tmp_path / "hf", model)
    file = write_dat(tmp_path / "x.dat", dict(model.state_dict()))
    with pytest.raises(TransferError, match="no qwen2 model with heads of 32"):
        write_gguf(file, source, tmp_path / "x.gguf")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_biases_that_llama_cpp_does_not_add_are_refused(tmp_path: Path, architecture: str) -> None:
    folder = model_folder(tmp_path, architecture, tied=True)
    config_type, model_type = MODELS[architecture]
    config = config_type.from_pretrained(folder)
    config.attention_bias = True
    config.save_pretrained(folder)
    file = write_dat(tmp_path / "x.dat", dict(model_type(config).state_dict()))
    with pytest.raises(TransferError, match=rf"x\.dat: model.*bias: a {architecture} model in GGUF has no biases"):
        write_gguf(file, folder, tmp_path / "x.gguf")
