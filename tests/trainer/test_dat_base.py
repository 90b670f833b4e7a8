"""Importing a .dat of plain numbers: projections become pairs, everything else keeps its bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import MODELS, tiny
from tiny_hf import write_hf
from transformers import AutoModelForCausalLM

from trainer.dat import DatError, DatReader, DatWriter, ScalarType
from trainer.importer import import_model
from trainer.model import load
from trainer.nvfp4 import quantise
from trainer.transfer import TransferError

TYPES = {torch.float16: ScalarType.FLOAT16, torch.bfloat16: ScalarType.BFLOAT16, torch.float32: ScalarType.FLOAT32}
IDS = torch.arange(40).reshape(2, 20)


def write_dat(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    with DatWriter(path, len(weights)) as writer:
        for name, value in weights.items():
            kind = ScalarType.UINT8 if value.dtype == torch.uint8 else ScalarType.FLOAT8_E4M3FN
            writer.write(name, value, TYPES.get(value.dtype, kind))
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_half_precision_file_says_what_its_model_says(
    tmp_path: Path, architecture: str, tied: bool, dtype: torch.dtype
) -> None:
    model = tiny(architecture, tied=tied)
    source = write_hf(tmp_path / "hf", model, dtype=dtype)
    weights = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    file = write_dat(source / "half.dat", dict(reversed(weights.items())))
    lm = load(import_model(str(file), tmp_path / "out") / "base.dat", dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(lm.module(IDS).logits, own(IDS).logits, rtol=1e-5, atol=1e-4)
    with DatReader(lm.path) as made, DatReader(file) as given:
        order = [name for name in made.entries if not name.endswith((".qdata", ".scale"))]
        assert order == [name for name in given.entries if name in order], "the file's own order"
        for name in order:
            assert made.entries[name].scalar_type == TYPES[dtype]
            assert made.raw(name) == given.raw(name)
        assert len(made.pairs()) == 15


def test_pairs_are_kept_byte_for_byte_whatever_their_scales(tmp_path: Path) -> None:
    model = tiny("llama", tied=False)
    source = write_hf(tmp_path / "hf", model)
    weights = dict(model.state_dict())
    qdata, scale = quantise(weights.pop("lm_head.weight"), rule="amax")
    weights |= {"lm_head.qdata": qdata ^ 1, "lm_head.scale": scale.half()}
    file = write_dat(tmp_path / "part.dat", weights)
    out = import_model(str(file), tmp_path / "out", model_folder=source)
    with DatReader(out / "base.dat") as made, DatReader(file) as given:
        for name in ("lm_head.qdata", "lm_head.scale"):
            assert made.entries[name].scalar_type == given.entries[name].scalar_type
            assert made.raw(name) == given.raw(name)


def test_an_embedding_that_is_a_pair_is_lm_head_as_well_when_they_are_tied(tmp_path: Path) -> None:
    model = tiny("llama", tied=True)
    source = write_hf(tmp_path / "hf", model)
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    qdata, scale = quantise(weights.pop("model.embed_tokens.weight"))
    weights |= {"model.embed_tokens.weight.qdata": qdata, "model.embed_tokens.weight.scale": scale}
    file = write_dat(source / "x.dat", weights)
    lm = load(import_model(str(file), tmp_path / "out") / "base.dat", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(lm.module(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-4)


Weights = dict[str, torch.Tensor]
NORM = "model.norm.weight"
WRONG: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "missing": (lambda w: w.pop(NORM), f"no entry for parameter {NORM}"),
    "no head": (lambda w: w.pop("lm_head.weight"), "no entry for parameter lm_head.weight"),
    "extra": (lambda w: w.update(odd=torch.ones(1)), "entry odd has no place"),
    "shape": (lambda w: w.update({NORM: torch.ones(3)}), rf"{NORM} is \[3\], config.json asks for \[64\]"),
    "type": (lambda w: w.update({NORM: torch.ones(64, dtype=torch.uint8)}), f"{NORM} is UINT8; weights are"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_the_configuration_is_named(tmp_path: Path, kind: str) -> None:
    model = tiny("qwen3", tied=False)
    source = write_hf(tmp_path / "hf", model)
    weights = dict(model.state_dict())
    breaking, said = WRONG[kind]
    breaking(weights)
    file = write_dat(source / "x.dat", weights)
    with pytest.raises(TransferError, match=rf"x\.dat: {said}"):
        import_model(str(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_and_foreign_bytes_are_errors_of_the_format(tmp_path: Path) -> None:
    model = tiny("qwen3", tied=False)
    source = write_hf(tmp_path / "hf", model)
    weights = dict(model.state_dict()) | {NORM: torch.full((64,), torch.nan)}
    file = write_dat(source / "x.dat", weights)
    with pytest.raises(DatError, match=rf"{NORM}.*NaN or infinite") as caught:
        import_model(str(file), tmp_path / "out")
    assert caught.value.path == file
    file.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(DatError, match="zip archive"):
        import_model(str(file), tmp_path / "out")


def test_a_file_without_a_folder_asks_for_one(tmp_path: Path) -> None:
    file = write_dat(tmp_path / "x.dat", {NORM: torch.ones(64)})
    with pytest.raises(TransferError, match=r"no config\.json in it"):
        import_model(str(file), tmp_path / "out")
