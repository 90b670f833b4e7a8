"""What every way into and out of this project's files shares: one kind of error, and folders that appear whole.

with fresh_folder(Path("models/x")) as work:      # models/x exists only once the block has ended
    ...
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL_TYPES = ("llama", "qwen2", "qwen3")
"""Architectures, by the name that ``config.json`` and GGUF both give them."""

TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What goes with a checkpoint's weights and ``config.json``, copied byte for byte where it is there."""


class TransferError(Exception):
    """A checkpoint that cannot be imported or exported; one line names the file and, where there is one, the tensor."""


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its name when the block ends, and vanishes when it raises.

    Raises TransferError when something is already there, before or after: nothing is ever overwritten.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
        folder = Path(work) / "folder"
        folder.mkdir()
        yield folder
        refuse_existing(target)
        try:
            folder.rename(target)
        except OSError as error:  # another process was quicker, or the disk is at fault
            raise TransferError(f"cannot place {target}: {error.strerror}") from error


def refuse_existing(target: Path) -> None:
    """Raise TransferError when ``target`` exists."""
    if os.path.lexists(target):
        raise TransferError(f"{target} exists already and is not overwritten: move it away or choose another --out")


def copy_text_files(source: Path, target: Path) -> None:
    """Copy ``TEXT_FILES`` that are there, as they are."""
    for name in TEXT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)  # through links: a hub cache holds its files as links


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises TransferError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TransferError(f"{path}: not JSON in UTF-8: {' '.join(str(error).split())}") from error


def check_model_type(path: Path, config: Any) -> dict[str, Any]:
    """``config``, the content of the config.json at ``path``, when its architecture is one of ``MODEL_TYPES``.

    Raises TransferError.
    """
    if not isinstance(config, dict):
        raise TransferError(f"{path}: holds a {type(config).__name__}, not the object of a configuration")
    found = config.get("model_type")
    if found not in MODEL_TYPES:
        raise TransferError(f"{path}: architecture {found!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    return config
