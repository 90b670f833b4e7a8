"""Importing GGUF checkpoints that are known to the last bit (tiny_gguf).

Nothing is lost in importing them, so the imported model must say exactly what transformers' own says.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import HIDDEN, MODELS, TOKENS, tiny, write_gguf

from trainer.dat import DatReader
from trainer.gguf_base import GgufError, is_paired, write_base, write_model_folder
from trainer.model import load


def imported(path: Path, folder: Path) -> Any:
    """The model folder of a GGUF file, loaded in float32."""
    folder.mkdir()
    write_model_folder(path, folder, rule="mse")
    return load(folder / "base.dat", dtype=torch.float32)


def assert_says_the_same(lm: Any, model: Any) -> None:
    ids = torch.randint(0, len(TOKENS), (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(lm.module(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("architecture", MODELS)
def test_an_imported_checkpoint_says_what_transformers_own_model_says(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    model = tiny(architecture, tied=tied)
    lm = imported(write_gguf(tmp_path / "x.gguf", model), tmp_path / "folder")

    state = model.state_dict()
    for name, parameter in lm.module.named_parameters():
        assert torch.equal(parameter, state[name]), name
    assert_says_the_same(lm, model)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_head_may_be_wider_than_hidden_size_by_heads(tmp_path: Path, architecture: str) -> None:
    model = tiny(architecture, tied=True, head=32)
    assert_says_the_same(imported(write_gguf(tmp_path / "x.gguf", model), tmp_path / "folder"), model)


def test_lm_head_is_an_entry_of_its_own_even_when_the_checkpoint_ties_it(tmp_path: Path) -> None:
    lm = imported(write_gguf(tmp_path / "x.gguf", tiny("llama", tied=True)), tmp_path / "folder")
    with DatReader(lm.path) as reader:
        assert "lm_head.weight" in reader.pairs()
        assert "model.embed_tokens.weight" in reader.entries


def test_tokenizer_and_chat_template_come_along(tmp_path: Path) -> None:
    lm = imported(write_gguf(tmp_path / "x.gguf", tiny("qwen2", tied=True)), tmp_path / "folder")
    assert lm.render("cab") == "<|im_start|>cab<|im_end|>"
    assert lm.encode("cab<|im_end|>") == [TOKENS.index(token) for token in ("c", "ab", "<|im_end|>")]
    assert lm.tokenizer.decode(lm.encode("你好")) == "你好"
    assert TOKENS.index("<|im_end|>") in lm.stop_ids


def test_a_file_is_parsed_once_and_the_reader_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Counting(gguf.GGUFReader):
        def __init__(self, path: Any, *rest: Any) -> None:
            opened.append(path)
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    path = write_gguf(tmp_path / "x.gguf", tiny("llama", tied=True))
    imported(path, tmp_path / "folder")
    assert opened == [path]
    assert gguf.GGUFReader is Counting


def test_quantised_tensors_are_decoded(tmp_path: Path) -> None:
    """Q8_0 holds blocks of 32 values as int8 x float16; here each is a multiple of a 127th of its block's largest."""
    model = tiny("llama", tied=False)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_(torch.randint(-127, 128, tuple(weight.shape), generator=torch.Generator().manual_seed(3)) / 256)
        weight.view(-1, 32)[:, 0] = 127 / 256
    raw = gguf.quantize(weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)

    class Quantised(gguf.GGUFWriter):
        def add_tensor(self, name: str, tensor: Any, **more: Any) -> None:  # type: ignore[override]
            if name == "blk.0.ffn_up.weight":
                super().add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                super().add_tensor(name, tensor, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Quantised)
        path = write_gguf(tmp_path / "x.gguf", model)

    from trainer.gguf_base import open_gguf, read_weights
    from trainer.model import parameter_shapes

    weights = dict(read_weights(open_gguf(path), model.config, parameter_shapes(model.config)))
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weight.detach())


@pytest.mark.parametrize("architecture", ["phi3", "mamba", "gpt2", "nothing-known"])
def test_another_architecture_is_refused_by_name(tmp_path: Path, architecture: str) -> None:
    model = tiny("llama", tied=True)
    model.config.model_type = architecture
    path = write_gguf(tmp_path / "x.gguf", model)
    with pytest.raises(
        GgufError, match=rf"x\.gguf: architecture '{architecture}' is not supported.*llama, qwen2, qwen3"
    ):
        write_model_folder(path, tmp_path, rule="mse")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_stretched_rotary_positions_are_refused_not_ignored(tmp_path: Path, kind: str) -> None:
    scaling = gguf.RopeScalingType(kind)
    path = write_gguf(tmp_path / "x.gguf", tiny("qwen2", tied=True), change=lambda w: w.add_rope_scaling_type(scaling))
    with pytest.raises(GgufError, match=rf"rope scaling '{kind}' is not supported"):
        write_model_folder(path, tmp_path, rule="mse")


def test_rotary_factors_are_refused_not_ignored(tmp_path: Path) -> None:
    def factors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))

    path = write_gguf(tmp_path / "x.gguf", tiny("llama", tied=True), change=factors)
    with pytest.raises(GgufError, match=r"rope_freqs\.weight"):
        write_model_folder(path, tmp_path, rule="mse")


def test_no_scaling_may_be_said_in_so_many_words(tmp_path: Path) -> None:
    model, none = tiny("qwen2", tied=True), gguf.RopeScalingType.NONE
    path = write_gguf(tmp_path / "x.gguf", model, change=lambda w: w.add_rope_scaling_type(none))
    assert_says_the_same(imported(path, tmp_path / "folder"), model)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(200), b"PK\x03\x04" + bytes(200)])
def test_what_is_not_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(GgufError, match=r"x\.gguf: "):
        write_model_folder(tmp_path / "x.gguf", tmp_path, rule="mse")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", tiny("llama", tied=True))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(GgufError, match=r"x\.gguf: "):
        write_model_folder(path, tmp_path, rule="mse")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = tiny("qwen3", tied=True)
    del model.model.layers[1].mlp.up_proj
    path = write_gguf(tmp_path / "x.gguf", model)
    with pytest.raises(GgufError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight .*blk\.1\.ffn_up"):
        write_model_folder(path, tmp_path, rule="mse")
    assert not (tmp_path / "base.dat").exists()


@pytest.mark.parametrize("name", ["model.norm", "model.layers.0.mlp.up_proj"])
def test_nan_is_named(tmp_path: Path, name: str) -> None:
    model = tiny("llama", tied=True)
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[3] = torch.nan
    path = write_gguf(tmp_path / "x.gguf", model)
    with pytest.raises(GgufError, match=r"x\.gguf: (output_norm|blk\.0\.ffn_up)\.weight holds values that are NaN"):
        write_model_folder(path, tmp_path, rule="mse")


def test_a_tokenizer_that_transformers_cannot_read_is_one_line(tmp_path: Path) -> None:
    class Without(gguf.GGUFWriter):
        def add_token_merges(self, merges: Any) -> None:
            """Left out."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Without)
        path = write_gguf(tmp_path / "x.gguf", tiny("llama", tied=True))
    with pytest.raises(GgufError, match=r"x\.gguf: configuration or tokenizer cannot be read \(KeyError"):
        write_model_folder(path, tmp_path, rule="mse")


def test_a_tensor_of_another_size_is_named(tmp_path: Path) -> None:
    model = tiny("llama", tied=True)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(HIDDEN + 16))
    path = write_gguf(tmp_path / "x.gguf", model)
    with pytest.raises(GgufError, match=r"output_norm\.weight has 80 values, model\.norm\.weight needs \[64\]"):
        write_model_folder(path, tmp_path, rule="mse")


@pytest.mark.parametrize(
    ("name", "shape", "paired"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), True),
        ("model.layers.0.mlp.down_proj.weight", (64, 128), True),
        ("lm_head.weight", (259, 64), True),
        ("model.layers.0.mlp.down_proj.weight", (64, 100), False),
        ("model.embed_tokens.weight", (259, 64), False),
        ("model.layers.0.self_attn.q_proj.bias", (64,), False),
        ("model.layers.0.self_attn.q_norm.weight", (16,), False),
        ("model.norm.weight", (64,), False),
    ],
)
def test_projections_and_head_are_pairs_and_nothing_else(name: str, shape: tuple[int, ...], paired: bool) -> None:
    assert is_paired(name, shape) is paired


def test_a_raw_tensor_is_float16_unless_it_does_not_fit(tmp_path: Path) -> None:
    values = {"small": torch.tensor([1.0, 65504.0]), "large": torch.tensor([1.0, 70000.0])}
    write_base(
        tmp_path / "x.dat",
        iter(values.items()),
        {name: tuple(value.shape) for name, value in values.items()},
        rule="mse",
    )
    with DatReader(tmp_path / "x.dat") as reader:
        assert {name: reader.tensor(name).dtype for name in values} == {"small": torch.float16, "large": torch.float32}
        assert torch.equal(reader.tensor("large"), values["large"])
