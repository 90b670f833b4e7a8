"""A model folder that is broken is told in one line that names it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from trainer.dat import DatError
from trainer.model import ModelError, load, read_folder


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model folder, to be broken."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_whole_folder_loads_with_its_tokenizer(folder: Path) -> None:
    lm = load(folder / "base.dat")
    assert lm.tokenizer.decode(lm.encode("你好 F#")) == "你好 F#"
    assert not lm.module.training
    assert not any(parameter.requires_grad for parameter in lm.module.parameters())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named_with_the_command_that_mends_it(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"no {name} in it .*align models get"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, text)
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
            for text in ("", "{", "[]")
        ),
        ("config.json", '{"model_type": "no-such"}'),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "?"}}'),
    ],
)
def test_a_broken_file_is_a_model_error_on_one_line(folder: Path, name: str, content: str) -> None:
    """The tokenizers library raises plain Exception for a tokenizer.json that it cannot read."""
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"configuration or tokenizer cannot be read") as caught:
        read_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dat_of_another_model_is_refused_by_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=256)
    with pytest.raises(
        ModelError, match=r"mlp\.gate_proj\.weight is \[128, 64\] in the file, \[256, 64\] by the folder"
    ):
        load(folder / "base.dat")


def test_a_dat_of_a_shallower_model_lacks_entries(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"no entry for parameter model\.layers\.2\."):
        load(folder / "base.dat")


def test_what_is_not_a_dat_is_a_dat_error(folder: Path) -> None:
    (folder / "base.dat").write_bytes(b"PK\x03\x04")
    with pytest.raises(DatError):
        load(folder / "base.dat")


def test_the_runner_s_template_has_no_system_message_and_a_newline_before_the_end(folder: Path) -> None:
    lm = load(folder / "base.dat")
    assert lm.render("你是誰", "runner") == "<|im_start|>user\n你是誰\n<|im_end|>\n<|im_start|>assistant\n"
    assert lm.render("你是誰") == "<|im_start|>user\n你是誰<|im_end|>\n<|im_start|>assistant\n"


def test_the_folder_s_hash_follows_the_files_that_decide_tokens(folder: Path) -> None:
    before = load(folder / "base.dat").tokenizer_sha256
    (folder / "notes.txt").write_text("of no account", encoding="utf-8")
    assert load(folder / "base.dat").tokenizer_sha256 == before
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert load(folder / "base.dat").tokenizer_sha256 != before
