"""A GGUF checkpoint to a model folder: configuration, tokenizer, chat template and ``base.dat``.

The configuration and the tokenizer come from transformers' own GGUF readers, tensor names and block decoding from the
``gguf`` library. This module adds what neither does: undoing llama.cpp's row order of rotary weights and the streaming
NVFP4 writing, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.dat import DatWriter, ScalarType
from trainer.nvfp4 import Rule, quantise
from trainer.transfer import MODEL_TYPES


class GgufError(Exception):
    """A GGUF file that cannot become a base; the message names the file and what is unsupported."""


def is_paired(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is stored as an NVFP4 pair: linear projections and lm_head, not embeddings, norms or biases.

    This is the layout of the user's own files (dat-format): 2-D ``….weight`` with in-features divisible by 16.
    """
    return name.endswith(("_proj.weight", "lm_head.weight")) and len(shape) == 2 and shape[1] % 16 == 0


def _rows_to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Undo the interleaved rotary row order that llama.cpp gives q and k of the ``llama`` architecture.

    llama.cpp stores each head's rows as (dim/2, 2); transformers wants (2, dim/2).
    """
    rows = weight.shape[0]
    half = rows // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def open_gguf(path: Path) -> Any:
    """A ``gguf.GGUFReader`` of a checkpoint that can be imported whole.

    Raises GgufError: not GGUF, cut short, another architecture, or rotary positions that transformers' reader would
    silently leave unscaled.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # what a broken file makes of its reader
        raise GgufError(f"{path}: not a whole GGUF file ({' '.join(str(error).split()) or 'no header'})") from error
    if architecture not in MODEL_TYPES:
        raise GgufError(f"{path}: architecture {architecture!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise GgufError(f"{path}: rope scaling {scaling.contents()!r} is not supported")
    if any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise GgufError(f"{path}: rope scaling by factors (rope_freqs.weight and its kin) is not supported")
    return reader


@contextmanager
def _already_open(reader: Any) -> Iterator[None]:
    """Hand ``reader`` to whoever opens its file. Transformers reads the header anew for the configuration and again for
    the tokenizer; parsing a vocabulary takes seconds, and it is the same file."""
    import gguf

    opened = gguf.GGUFReader
    gguf.GGUFReader = lambda *_: reader
    try:
        yield
    finally:
        gguf.GGUFReader = opened


def read_weights(reader: Any, config: Any, names: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter name, float32 tensor [its shape]) of ``open_gguf``'s reader for every name, in that order.

    A missing ``lm_head.weight`` is the embedding when the checkpoint ties them. Raises GgufError for an absent tensor
    or a wrong shape.
    """
    import gguf

    architecture = str(reader.fields["general.architecture"].contents())
    path = reader.data.filename
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    name_map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, shape in names.items():
        key = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = tensors.get(key)
        if tensor is None and name == "lm_head.weight":
            tensor = tensors.get(name_map.get_name("model.embed_tokens.weight", try_suffixes=(".weight",)))
        if tensor is None:
            raise GgufError(f"{path}: no tensor for {name} (looked for {key})")
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=True))
        if weight.numel() != _count(shape):
            raise GgufError(f"{path}: {key} has {weight.numel()} values, {name} needs {list(shape)}")
        if not bool(torch.isfinite(weight).all()):
            raise GgufError(f"{path}: {key} holds values that are NaN or infinite")
        weight = weight.reshape(shape)
        if architecture == "llama" and ".self_attn.q_proj." in name:
            weight = _rows_to_half_split(weight, config.num_attention_heads)
        elif architecture == "llama" and ".self_attn.k_proj." in name:
            weight = _rows_to_half_split(weight, config.num_key_value_heads)
        yield name, weight


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def write_model_folder(gguf_path: Path, folder: Path, *, rule: Rule) -> None:
    """Write config.json, the tokenizer files and base.dat of a GGUF checkpoint into the existing ``folder``."""
    from transformers import AutoConfig, AutoTokenizer

    from trainer.model import parameter_shapes

    reader = open_gguf(gguf_path)
    where, file = str(gguf_path.parent), gguf_path.name
    try:
        with _already_open(reader):
            config = AutoConfig.from_pretrained(where, gguf_file=file, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file, local_files_only=True)
    except Exception as error:  # fields that are missing or odd raise as each line of transformers' reader happens to
        said = " ".join(str(error).split())
        raise GgufError(
            f"{gguf_path}: configuration or tokenizer cannot be read ({type(error).__name__}: {said})"
        ) from error
    width = reader.fields.get(f"{config.model_type}.attention.key_length")  # transformers' reader passes over it
    if width is not None:
        config.head_dim = int(width.contents())
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = parameter_shapes(config)
    write_base(folder / "base.dat", read_weights(reader, config, names), names, rule=rule)


def write_base(
    path: Path, weights: Iterator[tuple[str, Tensor]], names: dict[str, tuple[int, ...]], *, rule: Rule
) -> None:
    """Write ``weights`` (float32, in the order of ``names``) as a .dat: NVFP4 pairs where ``is_paired``, else float16.

    A raw tensor that float16 cannot hold (largest magnitude above 65504) is written as float32.
    """
    pairs = sum(is_paired(name, shape) for name, shape in names.items())
    with DatWriter(path, len(names) + pairs) as writer:
        for name, weight in weights:
            if is_paired(name, tuple(weight.shape)):
                qdata, scale = quantise(weight, rule=rule, name=name)
                writer.write(f"{name}.qdata", qdata, ScalarType.UINT8)
                writer.write(f"{name}.scale", scale, ScalarType.FLOAT8_E4M3FN)
            elif float(weight.abs().max()) > torch.finfo(torch.float16).max:
                writer.write(name, weight, ScalarType.FLOAT32)
            else:
                writer.write(name, weight.to(torch.float16), ScalarType.FLOAT16)
