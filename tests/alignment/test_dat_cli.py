"""``align dat``: what it prints of real files, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from alignment import cli
from trainer.dat import DatReader, DatWriter, ScalarType, copy_entry
from trainer.files import sha256_file

HOSTILE = sorted((Path(__file__).parents[1] / "trainer" / "corpus").glob("*.dat"))


def align(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["align", "dat", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def changed(source: Path, target: Path, name: str) -> Path:
    """A copy of a file with one byte of one entry turned over."""
    with DatReader(source) as reader, DatWriter(target, len(reader.entries)) as writer:
        for entry in reader.entries.values():
            if entry.name == name:
                data = bytearray(reader.raw(name))
                data[0] ^= 0x11
                writer.write(name, data, entry.scalar_type, entry.shape)
            else:
                copy_entry(reader, writer, entry.name)
    return target


def test_inspect_shows_every_tensor_and_adds_up(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_model / "base.dat"
    code, out, _ = align(capsys, monkeypatch, "inspect", str(file))
    assert code == 0
    with DatReader(file) as reader:
        pairs = reader.pairs()
        assert all(f"\n{name}" in f"\n{out}" for name in pairs)
        assert "NVFP4, FLOAT8_E4M3FN scales" in out
        assert f"entries     {len(reader.entries):,}, of which {2 * len(pairs)} are halves of {len(pairs)}" in out
    assert sha256_file(file) in out

    code, out, _ = align(capsys, monkeypatch, "inspect", str(file), "--json")
    answer = json.loads(out)
    assert answer["parameters"] == sum(tensor["parameters"] for tensor in answer["tensors"])
    with DatReader(file) as reader:
        assert sum(tensor["bytes"] for tensor in answer["tensors"]) == sum(e.nbytes for e in reader.entries.values())


def test_inspect_names_what_is_odd_and_escapes_what_a_terminal_would_obey(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with DatWriter(tmp_path / "x.dat", 2) as writer:
        writer.write("w.qdata", torch.zeros(2, 8, dtype=torch.uint8), ScalarType.UINT8)
        writer.write("\x1b[31mred", torch.ones(1), ScalarType.FLOAT32)
    code, out, _ = align(capsys, monkeypatch, "inspect", str(tmp_path / "x.dat"))
    assert code == 0
    assert "odd         entry 'w.qdata'" in out
    assert "qdata without its scale" in out
    assert "\x1b" not in out


def test_verify_says_whole_or_which_rule(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, said = align(capsys, monkeypatch, "verify", str(tiny_model / "base.dat"))
    assert (code, said) == (0, "")
    assert "every rule of the format holds; no manifest beside it" in out
    data = (tiny_model / "base.dat").read_bytes()
    (tmp_path / "cut.dat").write_bytes(data[:-1])
    code, out, said = align(capsys, monkeypatch, "verify", str(tmp_path / "cut.dat"))
    assert (code, out) == (1, "")
    [line] = said.splitlines()
    assert line.startswith(f"{tmp_path / 'cut.dat'}: entry '")
    assert ", byte " in line


def test_verify_compares_with_the_recorded_hash(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model / "base.dat"
    file = changed(base, tmp_path / "x.dat", "model.layers.1.mlp.up_proj.weight.qdata")
    manifest = tmp_path / "x.dat.json"
    manifest.write_text(json.dumps({"sha256": sha256_file(file)}))
    code, out, _ = align(capsys, monkeypatch, "verify", str(file))
    assert code == 0
    assert "its hash is the recorded one" in out
    manifest.write_text(json.dumps({"sha256": sha256_file(base)}))
    code, out, said = align(capsys, monkeypatch, "verify", str(file))
    assert (code, out) == (1, "")
    assert f"records {sha256_file(base)}: the file was changed" in said


def test_a_broken_file_is_told_by_its_name(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cut.dat").write_bytes(b"\x82")
    for command in (["inspect"], ["diff", str(tiny_model / "base.dat")]):
        code, out, said = align(capsys, monkeypatch, *command, str(tmp_path / "cut.dat"))
        assert (code, out) == (2, "")
        assert said.startswith(f"align: {tmp_path / 'cut.dat'}: ")


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_verify_refuses_every_hostile_file_with_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, said = align(capsys, monkeypatch, "verify", str(path))
    assert (code, out, len(said.splitlines())) == (1, "", 1)


def test_no_file_is_a_wrong_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["inspect"], ["verify"], ["diff", str(tmp_path / "no.dat")]):
        code, _, said = align(capsys, monkeypatch, *command, str(tmp_path / "no.dat"))
        assert code == 2
        assert said == f"align: {tmp_path / 'no.dat'}: No such file or directory\n"


def test_diff_says_what_changed_and_what_did_not(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model / "base.dat"
    other = changed(base, tmp_path / "x.dat", "model.layers.1.mlp.up_proj.weight.qdata")
    code, out, _ = align(capsys, monkeypatch, "diff", str(base), str(other))
    assert code == 1
    [row] = [line for line in out.splitlines() if line.startswith("model.layers.N.mlp.up_proj.weight")]
    assert row.split()[3] == "2"
    assert "lm_head.weight: no stored value changed" in out

    code, out, _ = align(capsys, monkeypatch, "diff", str(base), str(other), "--json")
    groups = {group["group"]: group for group in json.loads(out)["groups"]}
    assert groups["model.layers.N.mlp.up_proj.weight"]["codes_changed"] == 2
    assert groups["lm_head.weight"]["codes_changed"] == 0

    code, out, _ = align(capsys, monkeypatch, "diff", str(base), str(base))
    assert code == 0
    assert "the two files hold the same weights" in out
