"""Writing safetensors one tensor at a time: the sizes are known before, so the header can be written first.

The library's own writer wants every tensor of a file in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.files import atomic_write

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_sharded(
    folder: Path, plan: list[Planned], tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int
) -> None:
    """Write ``tensors``, in the order of ``plan``, as model.safetensors in ``folder``.

    Above ``shard_bytes`` it is several files and an index, named as transformers does.
    """
    shards: list[list[Planned]] = [[]]
    for planned in plan:
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + planned.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(planned)
    stream = iter(tensors)
    if len(shards) == 1:
        _write(folder / "model.safetensors", shards[0], stream)
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, stream)
    index = {
        "metadata": {"total_size": sum(planned.nbytes for planned in plan)},
        "weight_map": {planned.name: name for name, shard in zip(names, shards, strict=True) for planned in shard},
    }
    with atomic_write(folder / "model.safetensors.index.json", "w") as file:
        json.dump(index, file, indent=2)


def _write(path: Path, plan: list[Planned], stream: Iterator[tuple[str, Tensor]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for planned in plan:
        span = [at, at + planned.nbytes]
        header[planned.name] = {"dtype": _NAMES[planned.dtype], "shape": planned.shape, "data_offsets": span}
        at = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for planned in plan:
            name, tensor = next(stream)
            if (name, tensor.dtype, tuple(tensor.shape)) != (planned.name, planned.dtype, planned.shape):
                raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} comes where {planned} was announced")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
