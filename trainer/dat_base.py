"""A half-precision (or partly quantised) ``.dat`` to a model folder.

Projections and lm_head that the file holds as plain numbers become NVFP4 pairs; every other entry, pairs included, is
copied byte for byte, in the file's order.
"""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.dat import DatReader, DatWriter, ScalarType
from trainer.dat_format import Entry
from trainer.dat_pairs import Pair, tensors
from trainer.dat_verify import value_problems
from trainer.gguf_base import is_paired
from trainer.hf_base import copy_model_texts, read_config, shapes_of
from trainer.nvfp4 import Rule, quantise
from trainer.transfer import TransferError

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = (ScalarType.FLOAT16, ScalarType.BFLOAT16, ScalarType.FLOAT32)


def write_model_folder(source: Path, texts: Path, folder: Path, *, rule: Rule) -> None:
    """Write base.dat of ``source`` and, from the folder ``texts``, config.json and the tokenizer into ``folder``.

    Raises TransferError (entries missing, unknown or of another shape), DatError (a broken file), ModelError.
    """
    from trainer.model import read_folder

    with DatReader(source) as reader:  # first: what is no .dat is told as such, whatever lies beside it
        read_config(texts)
        copy_model_texts(texts, folder)
        config, _ = read_folder(folder)
        names = shapes_of(texts, config)
        held = tensors(reader.entries, reader.pairs())
        _check(source, held, names, tied=bool(getattr(config, "tie_word_embeddings", False)))
        for problem in value_problems(reader):
            problem.path = source
            raise problem
        plan = dict(held)
        if _HEAD not in held:
            plan[_HEAD] = held[_EMBEDDING]
        entries = sum(
            2 if isinstance(tensor, Pair) or is_paired(name, tensor.shape) else 1 for name, tensor in plan.items()
        )
        with DatWriter(folder / "base.dat", entries) as writer:
            for name, tensor in plan.items():
                _write(reader, writer, name, tensor, rule)


def _check(source: Path, held: dict[str, Pair | Entry], names: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    for name, shape in names.items():
        if name == _HEAD and name not in held and tied:
            continue
        if name not in held:
            raise TransferError(f"{source}: no entry for parameter {name}; is this the .dat of that config.json?")
        if tuple(held[name].shape) != shape:
            raise TransferError(f"{source}: {name} is {list(held[name].shape)}, config.json asks for {list(shape)}")
    for name, tensor in held.items():
        if name not in names:
            raise TransferError(f"{source}: entry {name} has no place in the model that config.json describes")
        if isinstance(tensor, Entry) and tensor.scalar_type not in _FLOATS:
            raise TransferError(
                f"{source}: {name} is {tensor.scalar_type.name}; weights are FLOAT16, BFLOAT16 or FLOAT32"
            )


def _write(reader: DatReader, writer: DatWriter, name: str, tensor: Pair | Entry, rule: Rule) -> None:
    if isinstance(tensor, Pair):
        for part, entry in (("qdata", tensor.qdata), ("scale", tensor.scale)):
            own = entry.name if tensor.name == name else f"{name}.{part}"  # the embedding's pair is lm_head's as well
            writer.write(own, reader.raw(entry.name), entry.scalar_type, entry.shape)
    elif is_paired(name, tensor.shape):
        qdata, scale = quantise(reader.tensor(tensor.name).to(torch.float32), rule=rule, name=name)
        writer.write(f"{name}.qdata", qdata, ScalarType.UINT8)
        writer.write(f"{name}.scale", scale, ScalarType.FLOAT8_E4M3FN)
    else:
        writer.write(name, reader.raw(tensor.name), tensor.scalar_type, tensor.shape)
