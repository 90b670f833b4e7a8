"""Exported folders: transformers says from them what align says of the file, and 4-bit weights are the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_dat_base import write_dat
from tiny_gguf import MODELS, TOKENS, tiny
from tiny_hf import write_hf as write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.dat import DatReader
from trainer.export_hf import write_hf
from trainer.importer import import_model
from trainer.model import load
from trainer.nvfp4 import dequantise, quantise
from trainer.transfer import TransferError

IDS = torch.arange(40).reshape(2, 20)
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def model_folder(tmp_path: Path, architecture: str, *, tied: bool) -> Path:
    """A model folder of weights that are small and off the grid, as real ones are: their scales are subnormal."""
    model = tiny(architecture, tied=tied)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 50)
    source = write_checkpoint(tmp_path / "hf", model, dtype=torch.bfloat16)
    return import_model(str(source), tmp_path / "model")


def read(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000], ids=["one", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("architecture", MODELS)
def test_transformers_says_from_the_folder_what_align_says_of_the_file(
    tmp_path: Path, architecture: str, tied: bool, shard_bytes: int
) -> None:
    folder = model_folder(tmp_path, architecture, tied=tied)
    write_hf(folder / "base.dat", folder, tmp_path / "out", shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "model.safetensors").is_file() is (shard_bytes == 10**9)
    own, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert own.dtype == torch.bfloat16
    lm = load(folder / "base.dat", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(own(IDS).logits, lm.module(IDS).logits)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("cab 你好")["input_ids"] == lm.encode("cab 你好")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_head_that_is_the_embedding_is_tied_and_not_stored_twice(tmp_path: Path) -> None:
    model = tiny("qwen3", tied=True)
    source = write_checkpoint(tmp_path / "hf", model)
    file = write_dat(tmp_path / "x.dat", dict(model.state_dict()))
    assert write_hf(file, source, tmp_path / "out") == [n for n, p in model.named_parameters() if p.ndim == 1]
    assert "lm_head.weight" not in read(tmp_path / "out")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert own.config.tie_word_embeddings
    assert torch.equal(own.lm_head.weight, own.model.embed_tokens.weight)


def test_a_head_of_other_values_is_stored_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = tiny("qwen3", tied=True)
    source = write_checkpoint(tmp_path / "hf", model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["lm_head.weight"][3, 5] += 1
    write_hf(write_dat(tmp_path / "x.dat", weights), source, tmp_path / "out")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not own.config.tie_word_embeddings
    assert torch.equal(own.lm_head.weight.float(), weights["lm_head.weight"].bfloat16().float())
    assert not torch.equal(own.lm_head.weight, own.model.embed_tokens.weight)


def test_a_folder_comes_back_as_the_weights_it_was(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "qwen2", tied=False)
    write_hf(folder / "base.dat", folder, tmp_path / "out")
    back = import_model(str(tmp_path / "out"), tmp_path / "back")
    first, second = load(folder / "base.dat"), load(back / "base.dat")
    for (name, a), (_, b) in zip(first.module.named_parameters(), second.module.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("architecture", MODELS)
def test_the_nvfp4_layout_holds_the_same_numbers_under_a_real_global_scale(tmp_path: Path, architecture: str) -> None:
    folder = model_folder(tmp_path, architecture, tied=True)
    write_hf(folder / "base.dat", folder, tmp_path / "out", layout="nvfp4")
    stored = read(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    assert config["ignore"] == ["lm_head"]
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    largest: dict[str, list[float]] = {}
    with DatReader(folder / "base.dat") as reader:
        for name, pair in reader.pairs().items():
            if name == "lm_head.weight":
                continue
            packed, scale, whole = (stored[f"{name}_{part}"] for part in ("packed", "scale", "global_scale"))
            assert (packed.dtype, scale.dtype, whole.dtype) == (torch.uint8, torch.float8_e4m3fn, torch.float32)
            codes = torch.stack((packed & 15, packed >> 4), -1).reshape(packed.shape[0], -1).long()
            level = LEVELS[codes & 7] * torch.where(codes > 7, -1, 1)
            decoded = level * (scale.float() / whole).repeat_interleave(16, 1)
            ours = dequantise(reader.tensor(pair.qdata.name), reader.tensor(pair.scale.name), dtype=torch.float32)
            assert torch.equal(decoded, ours), name
            assert whole.shape == (1,)
            assert whole.item() > 1
            key = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
            largest.setdefault(f"{key} {whole.item()}", []).append(float(scale.float().max()))
    assert len(largest) == 8, "fused projections share a global scale"
    assert all(224 < max(values) <= 448 for values in largest.values()), "E4M3's range is used"


def half_scales(weights: dict[str, torch.Tensor]) -> None:
    qdata, scale = quantise(weights.pop("model.layers.0.mlp.up_proj.weight"))
    weights |= {
        "model.layers.0.mlp.up_proj.weight.qdata": qdata,
        "model.layers.0.mlp.up_proj.weight.scale": (scale.float() * 1.01).half(),
    }


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str, str]] = {
    "missing": (lambda w: w.pop("model.norm.weight"), "bfloat16", "no entry for parameter model.norm.weight"),
    "extra": (lambda w: w.update(odd=torch.ones(1)), "bfloat16", "entry odd has no place"),
    "shape": (lambda w: w.update({"model.norm.weight": torch.ones(3)}), "bfloat16", r"model.norm.weight is \[3\]"),
    "plain": (lambda w: None, "nvfp4", "no NVFP4 pairs in it; export with --layout bfloat16"),
    "half scales": (half_scales, "nvfp4", "the FLOAT16 scales of model.layers.0.mlp.up_proj.weight do not fit"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_exported_is_named_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    model = tiny("llama", tied=False)
    source = write_checkpoint(tmp_path / "hf", model)
    weights = dict(model.state_dict())
    breaking, layout, said = WRONG[kind]
    breaking(weights)
    file = write_dat(tmp_path / "x.dat", weights)
    with pytest.raises(TransferError, match=rf"x\.dat: .*{said}"):
        write_hf(file, source, tmp_path / "out", layout=layout)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "x.dat"]


def test_scales_that_are_not_e4m3_go_out_as_bfloat16(tmp_path: Path) -> None:
    model = tiny("llama", tied=False)
    source = write_checkpoint(tmp_path / "hf", model)
    weights = dict(model.state_dict())
    half_scales(weights)
    file = write_dat(tmp_path / "x.dat", weights)
    assert "model.layers.0.mlp.up_proj.weight" in write_hf(file, source, tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "llama", tied=True)
    with pytest.raises(TransferError, match="hf exists already"):
        write_hf(folder / "base.dat", folder, tmp_path / "hf")
    assert len(TOKENS) == load(folder / "base.dat").config.vocab_size


@pytest.mark.filterwarnings("ignore")  # that package's own
@pytest.mark.parametrize("architecture", MODELS)
def test_transformers_loads_the_nvfp4_layout(tmp_path: Path, architecture: str) -> None:
    """With the compressed-tensors package, which reads it: the very logits of the bfloat16 export."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    folder = model_folder(tmp_path, architecture, tied=True)
    write_hf(folder / "base.dat", folder, tmp_path / "four", layout="nvfp4")
    write_hf(folder / "base.dat", folder, tmp_path / "half")
    four, half = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("four", "half"))
    assert {name for name, _ in four.named_parameters() if name.endswith("_packed")}
    with torch.no_grad():
        assert torch.equal(four(IDS).logits, half(IDS).logits)
