"""Any checkpoint to a model folder: ``align dat import``.

    import_model("Qwen3-0.6B/", Path("models/mine"))            # a Hugging Face folder
    import_model("org/name@revision", Path("models/mine"))      # a Hugging Face id, through huggingface_hub
    import_model("x.gguf", Path("models/mine"))
    import_model("half.dat", Path("models/mine"))               # with config.json and tokenizer beside it

The folder appears whole or not at all and is never written over. ``base.dat.json`` in it says what it was made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import dat_base, gguf_base, hf_base, hub
from trainer.files import atomic_write, sha256_file
from trainer.nvfp4 import Rule
from trainer.transfer import TransferError, fresh_folder, refuse_existing

_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def import_model(
    source: str,
    out: Path,
    *,
    rule: Rule = "mse",
    model_folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the model folder ``out`` of ``source`` and return it. A path that exists goes before an id of the hub.

    ``model_folder``: where config.json and the tokenizer of a .dat are, when not beside it. Raises TransferError,
    GgufError, DatError, ModelError, OSError.
    """
    refuse_existing(out)
    path, record = _found(source, say)
    say(f"{source}: decoding and quantising to NVFP4")
    with fresh_folder(out) as fresh:
        if path.is_dir():
            hf_base.write_model_folder(path, fresh, rule=rule)
            files = [path / "config.json", *hf_base.weight_files(path)]
        elif _magic(path) == b"GGUF":
            record["source"] = "gguf"
            gguf_base.write_model_folder(path, fresh, rule=rule)
            files = [path]
        else:
            record["source"] = "dat"
            dat_base.write_model_folder(path, model_folder or path.parent, fresh, rule=rule)
            files = [path]
        record |= {
            "files": {file.name: sha256_file(file) for file in files},
            "sha256": sha256_file(fresh / "base.dat"),
            "rule": rule,
        }
        with atomic_write(fresh / "base.dat.json") as file:
            file.write((json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode())
    return out


def _found(source: str, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Where the source lies on this machine, and the beginning of its record."""
    path = Path(source)
    record: dict[str, Any] = {"kind": "base", "name": path.resolve().name, "source": "huggingface"}
    if path.is_dir():
        if not hf_base.is_checkpoint(path) and (path / "base.dat").is_file():
            raise TransferError(f"{source} is a model folder already (base.dat is in it): use it as it is")
        return path, record
    if path.is_file():
        if path.suffix == ".safetensors":
            raise TransferError(f"{source}: name the folder that holds it, with config.json and the tokenizer")
        return path, record
    if path.exists():
        raise TransferError(f"{source} is neither a file nor a folder")
    match = _ID.fullmatch(source)
    if match is None or path.suffix in (".dat", ".gguf", ".safetensors"):
        raise TransferError(
            f"{source}: no such file or folder, and not an id of the Hugging Face hub (org/name or org/name@revision)"
        )
    say(f"{source}: asking the hub")
    snapshot, revision = hub.fetch(match["name"], match["revision"])
    return snapshot, record | {"name": match["name"], "revision": revision}


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)
