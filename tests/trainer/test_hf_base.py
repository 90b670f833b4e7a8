"""Importing Hugging Face folders: nothing is lost of a checkpoint on the grid, and a broken one is told in one line."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_gguf import MODELS, TOKENS, tiny
from tiny_hf import write_hf
from transformers import AutoModelForCausalLM

from trainer.dat import DatReader
from trainer.files import sha256_file
from trainer.hf_base import INDEX, SINGLE, weight_files
from trainer.importer import import_model
from trainer.model import load
from trainer.nvfp4 import fake_quantise
from trainer.transfer import TransferError

IDS = torch.randint(0, len(TOKENS), (3, 20), generator=torch.Generator().manual_seed(1))


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = module(IDS).logits.float()
    return values


@pytest.mark.parametrize("shards", ["5GB", "40KB"], ids=["one", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("architecture", MODELS)
def test_an_imported_checkpoint_says_what_transformers_says(
    tmp_path: Path, architecture: str, tied: bool, shards: str
) -> None:
    source = write_hf(tmp_path / "hf", tiny(architecture, tied=tied), shards=shards)
    assert (len(weight_files(source)) > 2) is (shards == "40KB")
    lm = load(import_model(str(source), tmp_path / "out") / "base.dat", dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = own.state_dict()
    for name, parameter in lm.module.named_parameters():
        assert torch.equal(parameter, state[name]), name
    torch.testing.assert_close(logits(lm.module), logits(own), rtol=1e-5, atol=1e-4)
    assert lm.encode("cab<|im_end|>你好") == own_tokens(source, "cab<|im_end|>你好")


def own_tokens(source: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    return ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", MODELS)
def test_half_precision_checkpoints_agree_within_bfloat16_rounding(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    """Computed in bfloat16 on both sides: the logits are those of transformers' own model, bit for bit."""
    source = write_hf(tmp_path / "hf", tiny(architecture, tied=False), dtype=dtype)
    lm = load(import_model(str(source), tmp_path / "out") / "base.dat", dtype=torch.bfloat16)
    own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert torch.equal(logits(lm.module), logits(own))


@pytest.mark.parametrize("architecture", MODELS)
def test_weights_off_the_grid_are_rounded_by_the_rule_and_nothing_else(tmp_path: Path, architecture: str) -> None:
    model = tiny(architecture, tied=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    source = write_hf(tmp_path / "hf", model, dtype=torch.bfloat16)
    lm = load(import_model(str(source), tmp_path / "out") / "base.dat", dtype=torch.bfloat16)
    own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name:
                parameter.copy_(fake_quantise(parameter.float()))
    assert torch.equal(logits(lm.module), logits(own))


def test_stretched_rotary_positions_come_along(tmp_path: Path) -> None:
    model = tiny("llama", tied=True)
    source = write_hf(tmp_path / "hf", model)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    edit(source / "config.json", rope_parameters=rope)
    lm = load(import_model(str(source), tmp_path / "out") / "base.dat", dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.testing.assert_close(logits(lm.module), logits(own), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(logits(own), logits(model), atol=1e-2)


@pytest.mark.filterwarnings("ignore")  # transformers warns of a checkpoint that ties and stores both
def test_a_tied_checkpoint_may_store_both_and_either(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", tiny("qwen3", tied=True))
    weights = load_file(source / SINGLE)
    embedding = weights["model.embed_tokens.weight"]
    for i, change in enumerate(
        (
            weights | {"lm_head.weight": embedding.flip(0).contiguous()},
            {**{k: v for k, v in weights.items() if "embed" not in k}, "lm_head.weight": embedding},
        )
    ):
        save_file(change, source / SINGLE, metadata={"format": "pt"})
        lm = load(import_model(str(source), tmp_path / f"out{i}") / "base.dat", dtype=torch.float32)
        own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        torch.testing.assert_close(logits(lm.module), logits(own), rtol=1e-5, atol=1e-4)


def test_the_record_says_what_it_was_made_of_and_the_texts_are_the_same_bytes(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", tiny("llama", tied=True), shards="40KB")
    out = import_model(str(source), tmp_path / "models" / "out", rule="amax")
    record = json.loads((out / "base.dat.json").read_text())
    assert record["kind"] == "base"
    assert record["sha256"] == sha256_file(out / "base.dat")
    assert record["rule"] == "amax"
    assert record["files"] == {p.name: sha256_file(p) for p in (source / "config.json", *weight_files(source))}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    with DatReader(out / "base.dat") as reader:
        assert "lm_head.weight" in reader.pairs()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(TransferError, match="out exists already"):
        import_model(str(tmp_path / "hf"), tmp_path / "out")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in weights.items() if value is not None}, path, metadata={"format": "pt"})


NORM = "model__norm__weight"
WRONG: dict[str, tuple[Any, str]] = {
    "architecture": (
        lambda f: edit(f / "config.json", model_type="phi3"),
        "config.json: architecture 'phi3' is not supp",
    ),
    "no architecture": (
        lambda f: edit(f / "config.json", model_type=None),
        "architecture None is not supported; supported",
    ),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}),
        "config.json: the checkpoint is quantised already (gptq)",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: holds a list"),
    "config cut": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON in UTF-8"),
    "config nonsense": (lambda f: edit(f / "config.json", hidden_size="wide"), "config.json: cannot be read"),
    "no heads": (lambda f: edit(f / "config.json", num_attention_heads=0), "config.json: "),
    "padding beyond": (lambda f: edit(f / "config.json", pad_token_id=10**6), "config.json: "),
    "no config": (lambda f: (f / "config.json").unlink(), "not a Hugging Face checkpoint: no config.json"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "neither model.safetensors nor model.safetensors.index.json in it"),
    "pickle": (
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which is never opened",
    ),
    "cut": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-9]),
        "model.safetensors: not a whole safetensors file",
    ),
    "header": (
        lambda f: (f / SINGLE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
        "model.safetensors: not a whole safetensors file",
    ),
    "missing": (lambda f: rewrite(f / SINGLE, **{NORM: None}), "hf: no tensor model.norm.weight in the checkpoint"),
    "extra": (
        lambda f: rewrite(f / SINGLE, odd__one=torch.ones(2)),
        "hf: tensor odd.one has no place in the llama model",
    ),
    "shape": (
        lambda f: rewrite(f / SINGLE, **{NORM: torch.ones(48)}),
        "model.safetensors: model.norm.weight is [48], config.json asks for [64]",
    ),
    "dtype": (
        lambda f: rewrite(f / SINGLE, **{NORM: torch.ones(64).to(torch.float8_e4m3fn)}),
        "model.safetensors: model.norm.weight is F8_E4M3; only F16, BF16 and F32",
    ),
    "nan": (
        lambda f: rewrite(f / SINGLE, **{NORM: torch.full((64,), torch.nan)}),
        "model.safetensors: model.norm.weight holds 64 values that are NaN or infinite",
    ),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("*token*")],
        "no tokenizer.json",
    ),
    "shard elsewhere": (lambda f: index(f, "../x.safetensors"), "'../x.safetensors', which is not the name of a safe"),
    "shard missing": (lambda f: index(f, "x.safetensors"), "index.json: names x.safetensors, which is missing"),
    "shard pickle": (lambda f: index(f, "x.bin"), "'x.bin', which is not the name of a safetensors file"),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), "index.json: no weight_map"),
    "index lies": (lambda f: index(f, SINGLE, "odd"), "says odd is in model.safetensors, where it is not"),
}


def index(folder: Path, file: str, name: str = "model.norm.weight") -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: file}}))


@pytest.mark.parametrize("kind", WRONG)
def test_a_broken_checkpoint_is_one_line_that_names_it(tmp_path: Path, kind: str) -> None:
    source = write_hf(tmp_path / "hf", tiny("llama", tied=True))
    breaking, said = WRONG[kind]
    breaking(source)
    with pytest.raises(TransferError) as caught:
        import_model(str(source), tmp_path / "models" / "out")
    assert said in str(caught.value)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "models").iterdir()) == [], "nothing half-made stays"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


@given(content=JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.text(), st.text())}))
def test_no_index_leads_elsewhere_or_fails_otherwise(holder: Path, content: Any) -> None:
    (holder / INDEX).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TransferError) as caught:
        weight_files(holder)
    assert INDEX in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/such/path", "no such file or folder, and not an id"),
        ("gpt2", "no such file or folder, and not an id"),
        ("org/name.gguf", "no such file or folder"),
        ("/dev/null", "neither a file nor a folder"),
    ],
)
def test_what_is_no_source_is_told(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(TransferError, match=said):
        import_model(source, tmp_path / "out")


def test_a_model_folder_and_a_lone_file_are_told_what_they_are(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", tiny("llama", tied=True))
    out = import_model(str(source), tmp_path / "out")
    with pytest.raises(TransferError, match="is a model folder already"):
        import_model(str(out), tmp_path / "again")
    with pytest.raises(TransferError, match="name the folder that holds it"):
        import_model(str(source / SINGLE), tmp_path / "again")
