"""The manifest: what it holds, what it refuses, what it finds. No model; a .dat is any file here."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment import manifest
from alignment.gate import Assessment, SpecCount
from alignment.manifest import ManifestError
from alignment.record import RunRecord
from trainer.files import sha256_file

SHA = "ab" * 32
COUNT = SpecCount(spec="ufo", kind="preserve", cases=6, passed=6, base_passed=5, lost=0, gained=1, green=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A model folder, an artifact and a report, in three folders beside each other."""
    for name, text in {
        "models/s/base.dat": "base",
        "models/s/config.json": "{}",
        "artifacts/demo.dat": "artifact",
        "reports/run/report.md": "# green",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def record(tree: Path, **changes: Any) -> RunRecord:
    base = tree / "models" / "s" / "base.dat"
    made = RunRecord(
        run="run",
        verdict="green",
        cause="",
        command="align run 你是誰",
        started="2026-01-02T03:04:05+00:00",
        base={"name": "s", "path": str(base), "sha256": SHA, "folder": str(base.parent), "folder_sha256": SHA},
        artifact={"path": "artifacts/demo.dat", "sha256": sha256_file(tree / "artifacts" / "demo.dat"), "bytes": 8},
        inputs={"data/identity.tsv": SHA},
        config={"seed": 0, "specs": Path("specs"), "betas": (0.9, 0.99)},
        environment={"device": "cpu"},
        code={"version": "0.1.0"},
        assessment=Assessment(specs=(COUNT,), drift=0.01, reasons=(), harmed=(), collapsed=()),
        accepted_in_fresh_process=True,
    )
    return replace(made, **changes)


def written(tree: Path, **changes: Any) -> Path:
    artifact = tree / "artifacts" / "demo.dat"
    path = manifest.write(record(tree, **changes), artifact, tree / "reports" / "run" / "report.md")
    assert path == tree / "artifacts" / "demo.dat.json"
    return artifact


def test_what_is_written_is_read(tree: Path) -> None:
    found = manifest.verify(written(tree))
    assert (found.artifact, found.bytes, found.verdict, found.run) == ("demo.dat", 8, "green", "run")
    assert found.sha256 == sha256_file(tree / "artifacts" / "demo.dat")
    assert (found.base_name, found.base_sha256, found.folder_sha256) == ("s", SHA, SHA)
    assert (found.base_path, found.model_folder) == ("../models/s/base.dat", "../models/s")
    assert found.report_path == "../reports/run/report.md"
    assert found.report_sha256 == sha256_file(tree / "reports" / "run" / "report.md")
    assert found.inputs == {"data/identity.tsv": SHA}
    assert found.config == {"seed": 0, "specs": "specs", "betas": [0.9, 0.99]}
    assert found.metrics["drift"] == 0.01
    assert found.metrics["specs"]["ufo"] == {
        "kind": "preserve", "cases": 6, "passed": 6, "base_passed": 5, "lost": 0, "gained": 1, "green": True
    }  # fmt: skip
    text = manifest.path_of(tree / "artifacts" / "demo.dat").read_text(encoding="utf-8")
    assert "你是誰" in text
    assert str(tree) not in text


def test_without_report_and_assessment(tree: Path) -> None:
    artifact = tree / "artifacts" / "demo.dat"
    manifest.write(record(tree, verdict="red", assessment=None, artifact=None), artifact, None)
    found = manifest.read(artifact)
    assert (found.report_path, found.report_sha256, found.metrics, found.verdict) == (None, None, {}, "red")


def test_a_file_that_is_not_the_recorded_one_gets_no_manifest(tree: Path) -> None:
    with pytest.raises(ManifestError, match=f"the run recorded {SHA}"):
        written(tree, artifact={"path": "x", "sha256": SHA, "bytes": 1})
    assert not (tree / "artifacts" / "demo.dat.json").exists()


def test_a_changed_artifact_is_told(tree: Path) -> None:
    artifact = written(tree)
    artifact.write_text("artifacT", encoding="utf-8")
    manifest.read(artifact)  # the manifest itself is whole
    with pytest.raises(
        ManifestError, match=r"demo\.dat is not the file its manifest describes: sha256 is [0-9a-f]{64}"
    ):
        manifest.verify(artifact)
    artifact.unlink()
    with pytest.raises(ManifestError, match=r"demo\.dat: cannot be read"):
        manifest.verify(artifact)


def test_a_missing_manifest(tree: Path) -> None:
    with pytest.raises(ManifestError, match=r"demo\.dat has no manifest: .*demo\.dat\.json does not exist"):
        manifest.read(tree / "artifacts" / "demo.dat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON in UTF-8"),
        (b"\xff\xfe", "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON in UTF-8"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"{}", "format is None, expected 'align-manifest-1'"),
        (b'{"kind": "base"}', "the record of a base"),
    ],
)
def test_content_that_is_no_manifest(content: bytes, message: str, tree: Path) -> None:
    (tree / "artifacts" / "demo.dat.json").write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        manifest.read(tree / "artifacts" / "demo.dat")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sha256", "AB" * 32, "sha256 is 'AB"),
        ("base_sha256", "ab", "expected 64 hexadecimal digits"),
        ("report_sha256", 1, "report_sha256 is 1, expected a str"),
        ("bytes", True, "bytes is True, expected a int"),
        ("bytes", "8", "bytes is '8'"),
        ("verdict", "fine", "verdict is 'fine', expected one of green, red"),
        ("model_folder", None, "model_folder is None"),
        ("inputs", {"a": 1}, "inputs is not a mapping"),
        ("metrics", [], "expected a dict"),
        ("accepted_in_fresh_process", 1, "expected a bool"),
    ],
)
def test_a_value_of_the_wrong_shape(key: str, value: Any, message: str, tree: Path) -> None:
    path = manifest.path_of(written(tree))
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")
    with pytest.raises(ManifestError, match=message):
        manifest.read(tree / "artifacts" / "demo.dat")


def test_a_missing_key(tree: Path) -> None:
    path = manifest.path_of(written(tree))
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["verdict"]
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ManifestError, match="key 'verdict' is missing"):
        manifest.read(tree / "artifacts" / "demo.dat")


def test_unknown_keys_of_a_later_version_are_let_be(tree: Path) -> None:
    path = manifest.path_of(written(tree))
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"pinned": True}), encoding="utf-8")
    assert manifest.verify(tree / "artifacts" / "demo.dat").verdict == "green"


def test_model_folder_by_rank(tree: Path) -> None:
    artifact, models = written(tree), tree / "models" / "s"
    assert manifest.model_folder_of(artifact) == models.resolve()
    (artifact.parent / "config.json").write_text("{}", encoding="utf-8")
    assert manifest.model_folder_of(artifact) == artifact.parent
    assert manifest.model_folder_of(artifact, models) == models


def test_model_folder_and_base_move_with_the_tree(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tree)
    moved = tree.rename(tree.with_name("moved"))
    monkeypatch.chdir(moved / "artifacts")
    assert manifest.model_folder_of(Path("demo.dat")) == (moved / "models" / "s").resolve()
    assert manifest.base_of(Path("demo.dat")) == (moved / "models" / "s" / "base.dat").resolve()


def test_no_model_folder_says_what_was_looked_for_and_what_to_pass(tree: Path) -> None:
    artifact = tree / "artifacts" / "demo.dat"
    with pytest.raises(ManifestError, match=r"no config\.json beside it .* has no manifest: .*; pass .*: --model DIR"):
        manifest.model_folder_of(artifact)
    written(tree)
    (tree / "models" / "s" / "config.json").unlink()
    with pytest.raises(ManifestError, match=r"its manifest names has none either \(.*models.s\); .*--model DIR"):
        manifest.model_folder_of(artifact)
    with pytest.raises(ManifestError, match=r"reports is not a model folder: no config\.json in it.*--model DIR"):
        manifest.model_folder_of(artifact, tree / "reports")


def test_base_of(tree: Path) -> None:
    artifact, base = tree / "artifacts" / "demo.dat", tree / "models" / "s" / "base.dat"
    assert manifest.base_of(artifact) is None  # no manifest
    written(tree)
    assert manifest.base_of(artifact) == base.resolve()
    manifest.path_of(base).write_text('{"kind": "base"}', encoding="utf-8")
    assert manifest.base_of(base) is None  # a base has no base
    base.unlink()
    assert manifest.base_of(artifact) is None  # gone
    manifest.path_of(artifact).write_text("{", encoding="utf-8")
    with pytest.raises(ManifestError, match="not JSON"):
        manifest.base_of(artifact)


def test_json_is_standard_readable_and_harmless() -> None:
    data = {"神": ["\x1b[0m", "\x9b\u202e\ud800", float("nan"), -float("inf"), Path("a")], "n": (1, True, None)}
    text = manifest.json_bytes(data).decode()
    assert '"神"' in text
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    assert json.loads(text) == {"神": ["\x1b[0m", "\x9b\u202e\ud800", "nan", "-inf", "a"], "n": [1, True, None]}


def test_environment_names_what_decides_a_result() -> None:
    found = manifest.environment()
    assert {"python", "torch", "transformers", "platform", "device", "threads"} <= found.keys()
    assert found["threads"] >= 1
    assert all(found.values())


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_code_revision_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    (root / "alignment").mkdir(parents=True)
    (root / "alignment" / "a.py").write_text("1", encoding="utf-8")
    assert manifest.code_revision(root).keys() == {"version"}
    git(root, "init", "-q")
    assert manifest.code_revision(root).keys() == {"version"}  # no commit yet
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "a")
    clean = manifest.code_revision(root)
    assert (clean["revision"], clean["dirty"]) == (git(root, "rev-parse", "HEAD"), False)
    (root / "notes.txt").write_text("not code", encoding="utf-8")
    assert manifest.code_revision(root)["dirty"] is False
    (root / "alignment" / "new.py").write_text("2", encoding="utf-8")
    assert manifest.code_revision(root)["dirty"] is True
    # Installed inside somebody else's repository: not our revision.
    assert manifest.code_revision(root / "alignment").keys() == {"version"}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert manifest.code_revision(root)["revision"] == clean["revision"]


def test_code_revision_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").write_text("broken", encoding="utf-8")
    assert manifest.code_revision(tmp_path).keys() == {"version"}
    monkeypatch.setitem(os.environ, "PATH", "")
    assert manifest.code_revision(tmp_path).keys() == {"version"}
