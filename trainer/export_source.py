"""A ``.dat`` about to be exported: its parameters by name, checked against the model folder before anything is written.

with ExportSource(Path("x.dat"), Path("models/mine")) as source:
    source.shapes, source.bfloat16("model.norm.weight")
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from trainer.dat import DatReader
from trainer.dat_format import Entry, ScalarType
from trainer.dat_pairs import Pair, tensors
from trainer.hf_base import shapes_of
from trainer.nvfp4 import dequantise
from trainer.transfer import TransferError, check_model_type, read_json

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = (ScalarType.FLOAT16, ScalarType.BFLOAT16, ScalarType.FLOAT32)


class ExportSource:
    """The opened file. ``shapes`` holds what has to be exported: without lm_head where it is the embedding.

    Raises TransferError (another architecture; entries missing, unknown, of another shape or type), DatError,
    ModelError.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        from trainer.model import read_folder

        self.path, self.folder = path, folder
        self.reader = DatReader(path)
        self.plain: dict[str, Any] = check_model_type(folder / "config.json", read_json(folder / "config.json"))
        """config.json as it is."""
        self.config, self.tokenizer = read_folder(folder)
        self.held = tensors(self.reader.entries, self.reader.pairs())
        self.shapes = shapes_of(folder, self.config)
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        self._check(tied)
        self.tied = HEAD not in self.held or self._head_is_embedding()
        """Whether the output layer has the values of the embedding."""
        if self.tied:
            del self.shapes[HEAD]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.reader.close()

    def _check(self, tied: bool) -> None:
        for name, shape in self.shapes.items():
            held = self.held.get(name)
            if held is None and not (tied and name == HEAD):
                raise TransferError(f"{self.path}: no entry for parameter {name}; is {self.folder} its model folder?")
            if held is not None and tuple(held.shape) != shape:
                raise TransferError(f"{self.path}: {name} is {list(held.shape)}, {self.folder} asks for {list(shape)}")
            if isinstance(held, Entry) and held.scalar_type not in _FLOATS:
                raise TransferError(f"{self.path}: {name} is {held.scalar_type.name}, not a weight's type")
        for name in self.held:
            if name not in self.shapes:
                raise TransferError(f"{self.path}: entry {name} has no place in the model of {self.folder}")

    def _head_is_embedding(self) -> bool:
        head, embedding = self.held[HEAD], self.held[EMBEDDING]
        if isinstance(head, Pair) or isinstance(embedding, Pair):
            # A base that was imported from a tied checkpoint holds a quantised head: other numbers than the embedding.
            return torch.equal(self.values(HEAD).float(), self.values(EMBEDDING).float())
        same_type = head.scalar_type == embedding.scalar_type
        return same_type and self.reader.raw(head.name) == self.reader.raw(embedding.name)

    def pair(self, name: str) -> Pair | None:
        """The NVFP4 pair that holds parameter ``name``, if one does."""
        held = self.held[name]
        return held if isinstance(held, Pair) else None

    def values(self, name: str) -> Tensor:
        """Parameter ``name``: a pair decoded to bfloat16 (float32 for scales that are not E4M3), an entry as stored."""
        held = self.held[name]
        if isinstance(held, Entry):
            return self.reader.tensor(name)
        exact = held.scale.scalar_type == ScalarType.FLOAT8_E4M3FN
        return dequantise(
            self.reader.tensor(held.qdata.name),
            self.reader.tensor(held.scale.name),
            dtype=torch.bfloat16 if exact else torch.float32,
            name=name,
        )

    def bfloat16(self, name: str) -> tuple[Tensor, bool]:
        """Parameter ``name`` in bfloat16, and whether that rounded it."""
        values = self.values(name)
        rounded = values.to(torch.bfloat16)
        return rounded, not torch.equal(rounded.float(), values.float())
