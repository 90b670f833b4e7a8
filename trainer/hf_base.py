"""A Hugging Face folder (safetensors, one file or sharded) to a model folder.

    write_model_folder(Path("Qwen3-0.6B"), Path("models/mine"), rule="mse")

Weights are read one tensor at a time through a memory map. Only safetensors is opened, no pickle and no code of the
checkpoint; the configuration and the tokenizer are copied as they are. float16, bfloat16 and float32 checkpoints are
taken; what is already quantised is refused, as it would be quantised twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.gguf_base import write_base
from trainer.nvfp4 import Rule
from trainer.transfer import TransferError, check_model_type, copy_text_files, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F16", "BF16", "F32"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"
"""The end of names that old checkpoints store and transformers computes."""


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` holds weights that ``write_model_folder`` reads, or says why it cannot."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def read_config(folder: Path) -> Any:
    """transformers' configuration of the checkpoint in ``folder``.

    Raises TransferError: no config.json or a broken one, another architecture, weights that are quantised already.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise TransferError(f"{folder} is not a Hugging Face checkpoint: no config.json in it")
    plain = check_model_type(path, read_json(path))
    quantised = plain.get("quantization_config") or plain.get("compression_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise TransferError(
            f"{path}: the checkpoint is quantised already ({method}); import its float16 or bfloat16 original"
        )
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its checks raise errors of many kinds, some their own
        raise TransferError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def shapes_of(folder: Path, config: Any) -> dict[str, tuple[int, ...]]:
    """``parameter_shapes`` of the config.json in ``folder``. Raises TransferError for numbers that make no model."""
    from trainer.model import parameter_shapes

    try:
        return parameter_shapes(config)
    except Exception as error:  # whatever transformers and torch make of nonsense: no heads, a padding token beyond
        raise TransferError(
            f"{folder / 'config.json'}: describes no model ({_said(error) or type(error).__name__})"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files. Raises TransferError when one that the index names is missing."""
    return list(dict.fromkeys(_locate(folder).values())) if (folder / INDEX).is_file() else [_single(folder)]


def _single(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    why = f"; {pickles[0]} is a pickle, which is never opened: save it as safetensors" if pickles else ""
    raise TransferError(f"{folder}: neither {SINGLE} nor {INDEX} in it{why}")


def _locate(folder: Path) -> dict[str, Path]:
    """Tensor name to file, as the index says."""
    path = folder / INDEX
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise TransferError(f"{path}: no weight_map in it")
    found: dict[str, Path] = {}
    for name, file in names.items():
        # A plain name: an index comes from anywhere and must not make this read files elsewhere.
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\:\0"):
            raise TransferError(f"{path}: {name} is in {file!r}, which is not the name of a safetensors file beside it")
        found[name] = folder / file
    for file in dict.fromkeys(found.values()):
        if not file.is_file():
            raise TransferError(f"{path}: names {file.name}, which is missing; fetch the checkpoint again")
    return found


class Checkpoint:
    """The opened safetensors files of a folder. Opening checks the headers: every tensor where the index says."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        located = _locate(folder) if (folder / INDEX).is_file() else None
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in dict.fromkeys(located.values()) if located else [_single(folder)]:
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise TransferError(f"{path}: not a whole safetensors file ({_said(error)})") from error
            self._files |= dict.fromkeys(opened.keys(), (path, opened))
        for name, path in (located or {}).items():
            if self._files.get(name, (None, None))[0] != path:
                raise TransferError(f"{folder / INDEX}: says {name} is in {path.name}, where it is not")

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._files)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Tensor ``name``, float32 of ``shape``. Raises TransferError for another shape or type, NaN and infinities."""
        path, opened = self._files[name]
        try:
            head = opened.get_slice(name)
            kind, found = head.get_dtype(), tuple(head.get_shape())
            if kind not in _DTYPES:
                raise TransferError(f"{path}: {name} is {kind}; only F16, BF16 and F32 weights are imported")
            if found != shape:
                raise TransferError(f"{path}: {name} is {list(found)}, config.json asks for {list(shape)}")
            value: Tensor = opened.get_tensor(name).float()
        except SafetensorError as error:
            raise TransferError(f"{path}: {name} cannot be read ({_said(error)})") from error
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise TransferError(f"{path}: {name} holds {bad:,} values that are NaN or infinite")
        return value


def _said(error: Exception) -> str:
    return " ".join(str(error).split())


def read_weights(
    checkpoint: Checkpoint, config: Any, names: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter name, float32 tensor of its shape) for every name, in that order.

    As transformers does, a tied checkpoint may hold embedding and lm_head both, or either for both. Raises
    TransferError, for missing and for unknown tensors before the first is read.
    """
    stored = checkpoint.names()
    source = {name: name for name in names}
    if getattr(config, "tie_word_embeddings", False):
        for absent, other in ((_HEAD, _EMBEDDING), (_EMBEDDING, _HEAD)):
            if absent not in stored:
                source[absent] = other
    missing = [name for name in names if source[name] not in stored]
    if missing:
        raise TransferError(
            f"{checkpoint.folder}: no tensor {_some(missing)} in the checkpoint; config.json asks for it"
        )
    extra = sorted(name for name in stored - set(names) if not name.endswith(_COMPUTED))
    if extra:
        raise TransferError(
            f"{checkpoint.folder}: tensor {_some(extra)} has no place in the {config.model_type} model of config.json"
        )
    for name, shape in names.items():
        yield name, checkpoint.read(source[name], shape)


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def write_model_folder(source: Path, folder: Path, *, rule: Rule) -> None:
    """Write config.json, the tokenizer files and base.dat of the checkpoint ``source`` into the existing ``folder``.

    Raises TransferError, ModelError for a configuration or tokenizer that transformers cannot read.
    """
    from trainer.model import read_folder

    config = read_config(source)
    with ExitStack() as stack:
        checkpoint = Checkpoint(source, stack)  # before anything is written: most mistakes show here
        copy_model_texts(source, folder)
        config, _ = read_folder(folder)
        names = shapes_of(source, config)
        write_base(folder / "base.dat", read_weights(checkpoint, config, names), names, rule=rule)


def copy_model_texts(source: Path, folder: Path) -> None:
    """Copy config.json and the tokenizer; an older tokenizer without tokenizer.json is converted by transformers."""
    shutil.copyfile(source / "config.json", folder / "config.json")
    copy_text_files(source, folder)
    if (folder / "tokenizer.json").is_file():
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raise Exception itself, and what is missing is told in many kinds
        raise TransferError(
            f"{source}: no tokenizer.json, and no tokenizer to make it from ({_said(error)})"
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise TransferError(f"{source}: no tokenizer.json in it, and its tokenizer cannot be saved as one")
