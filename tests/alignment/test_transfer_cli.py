"""``align dat import`` and ``export`` as a user meets them: commands, exit codes, and a hub on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import COMMIT, TOKEN, LoopbackHub, serve

from alignment import cli
from trainer.files import sha256_file

HERE = Path(__file__).resolve()


def align(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["align", "dat", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A sharded Hugging Face folder with a pickle beside it that nobody may touch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    folder = tmp_path_factory.mktemp("hub") / "tiny"
    config = LlamaConfig.from_pretrained(tiny_model)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return folder


def test_import_makes_a_folder_and_says_where(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, said = align(capsys, monkeypatch, "import", checkpoint, "--out", tmp_path / "m")
    assert (code, said) == (0, "")
    assert str(tmp_path / "m" / "base.dat") in out
    code, _, said = align(capsys, monkeypatch, "verify", tmp_path / "m" / "base.dat")
    assert (code, said) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing-there", "--out", "m"], "align: nothing-there: no such file or folder"),
        ([str(HERE), "--out", "m"], f"align: {HERE}: entry "),
        ([str(HERE.parent), "--out", "m"], "is not a Hugging Face checkpoint: no config.json in it"),
        (["x/y", "--out", "m", "--rule", "best"], "align: --rule best: choose mse or amax"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, heard = align(capsys, monkeypatch, "import", *arguments)
    assert code == 2
    assert said in heard
    assert len(heard.splitlines()) == 1


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[LoopbackHub]:
    with serve(checkpoint) as running:
        yield running


def fetch(hub: LoopbackHub | str, home: Path, source: str, out: Path, **environment: str) -> Any:
    """``align dat import`` in a process of its own: huggingface_hub reads its settings once, at import."""
    address = hub if isinstance(hub, str) else hub.address
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.lower().startswith("hf_") and "proxy" not in key.lower()
    }
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "PYTHONPATH": str(HERE.parents[2])}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "alignment.cli", "dat", "import", source, "--out", str(out)],
        env=clean | settings | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_id_comes_through_the_hub_once_and_then_from_the_cache(
    hub: LoopbackHub, checkpoint: Path, tmp_path: Path
) -> None:
    done = fetch(hub, tmp_path / "home", "org/tiny", tmp_path / "a")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    record = json.loads((tmp_path / "a" / "base.dat.json").read_text())
    assert (record["name"], record["revision"]) == ("org/tiny", COMMIT)
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {name: record["files"][name] for name in (p.name for p in shards)} == {
        p.name: sha256_file(p) for p in shards
    }
    of_model = {token for _, path, token in hub.asked if "org/tiny" in path}  # the client also asks of other things
    assert of_model == {f"Bearer {TOKEN}"}
    sent = hub.downloads()
    assert len(sent) == len(set(sent)), "each file once"
    assert {p.name for p in shards} < set(sent)
    assert not any(name.endswith((".bin", ".py")) for name in sent), "no pickle, no code"

    hub.asked.clear()
    done = fetch(hub, tmp_path / "home", f"org/tiny@{COMMIT}", tmp_path / "b")
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.downloads() == []
    done = fetch("http://127.0.0.1:1", tmp_path / "home", "org/tiny", tmp_path / "c", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert sha256_file(tmp_path / "a" / "base.dat") == sha256_file(tmp_path / "c" / "base.dat")


@pytest.mark.parametrize(
    ("source", "environment", "said"),
    [
        ("org/none", {}, "org/none: the hub knows no such model"),
        ("org/tiny@lost", {}, "org/tiny@lost: the hub knows no such revision"),
        ("org/gated", {}, "org/gated: the hub asks for an accepted licence"),
        ("org/tiny", {"HF_TOKEN": "hf_wrong"}, "org/tiny: the hub refuses access (401)"),
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}, "org/tiny: not in the cache, and HF_HUB_OFFLINE is set"),
        (
            "org/tiny",
            {"HF_ENDPOINT": "http://127.0.0.1:1"},
            "org/tiny: the hub at http://127.0.0.1:1 cannot be reached",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: LoopbackHub, tmp_path: Path, source: str, environment: dict[str, str], said: str
) -> None:
    done = fetch(hub, tmp_path / "home", source, tmp_path / "m", **environment)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"align: {said}")
    assert not (tmp_path / "m").exists()


def test_export_finds_the_model_folder_and_says_what_was_rounded(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model / "base.dat"
    code, out, said = align(capsys, monkeypatch, "export", base, "--to", "hf", "--out", tmp_path / "hf")
    assert (code, said) == (0, "")
    assert out.startswith("rounded to bfloat16: 6 tensors that were not NVFP4 (first model.embed_tokens.weight)\n")
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    alone = tmp_path / "alone.dat"
    alone.write_bytes(base.read_bytes())
    for arguments in (["gguf", "--out", tmp_path / "x.gguf"], ["hf", "--layout", "nvfp4", "--out", tmp_path / "nv"]):
        command = ["export", alone, "--model-folder", tiny_model, "--to", *arguments]
        code, out, said = align(capsys, monkeypatch, *command)
        assert (code, out, said) == (0, f"{arguments[-1]}\n" if "gguf" in arguments else out, "")
        code, out, said = align(capsys, monkeypatch, *command)
        assert (code, out) == (2, "")
        assert said.startswith(f"align: {arguments[-1]} exists already")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "onnx"], "align: --to onnx: choose hf or gguf"),
        (["--to", "hf", "--layout", "int8"], "align: --layout int8: choose bfloat16 or nvfp4"),
        (["--to", "gguf", "--layout", "nvfp4"], "align: --layout nvfp4 is for --to hf"),
        (["--to", "hf"], "align: no model folder for "),
    ],
)
def test_a_wrong_export_is_one_line(
    options: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "x.dat").write_bytes(b"\0")
    code, _, heard = align(capsys, monkeypatch, "export", tmp_path / "x.dat", "--out", tmp_path / "out", *options)
    assert code == 2
    assert heard.startswith(said)
    assert len(heard.splitlines()) == 1
    assert not (tmp_path / "out").exists()
