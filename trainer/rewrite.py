"""A `.dat` like another one, with new values: the same entries in the same order and types.

    with DatReader(base) as reader:
        write_like(reader, path, values, scales, rule="mse")

A tensor that is not among the values keeps its very bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from trainer.dat import DatReader, DatWriter, Entry, ScalarType, copy_entry
from trainer.nvfp4 import Rule, quantise

Encoded = dict[str, tuple[Tensor, ScalarType]]


@torch.no_grad()
def write_like(
    reader: DatReader, path: Path, values: Mapping[str, Tensor], scales: Mapping[str, Tensor], *, rule: Rule
) -> None:
    """Write `path` as `reader`'s file with ``values`` (any float type, by parameter name) in their places.

    A pair among them is quantised by ``rule`` and keeps the blocks' ``scales`` (float8_e4m3fn, by parameter name) where
    they suffice; a raw entry is rounded to its type. On a CUDA device the next tensor is rounded and fetched while one
    is written. Raises what `quantise` and `DatWriter` raise.
    """
    pairs = reader.pairs()
    owner = {part.name: name for name, pair in pairs.items() if name in values for part in (pair.qdata, pair.scale)}

    def encode(name: str) -> Encoded:
        value = values[name].detach()
        if name not in pairs:
            kind = reader.entries[name].scalar_type
            return {name: (value.to(kind.dtype).cpu(), kind)}
        pair = pairs[name]
        codes, scale = quantise(value, rule=rule, name=name, keep=scales.get(name))
        return {
            pair.qdata.name: (codes.cpu(), pair.qdata.scalar_type),
            pair.scale.name: (scale.cpu(), pair.scale.scalar_type),
        }

    def tensor_of(entry: Entry) -> str | None:
        return owner.get(entry.name, entry.name if entry.name in values else None)

    names = list(dict.fromkeys(name for entry in reader.entries.values() if (name := tensor_of(entry))))
    ahead = any(value.is_cuda for value in values.values())
    with DatWriter(path, len(reader.entries)) as writer, ThreadPoolExecutor(1) as pool:
        results = _in_turn(pool, encode, names) if ahead else map(encode, names)
        ready: Encoded = {}
        for entry in reader.entries.values():
            if tensor_of(entry) is None:
                copy_entry(reader, writer, entry.name)
                continue
            if entry.name not in ready:
                ready.update(next(results))
            writer.write(entry.name, *ready.pop(entry.name))


def _in_turn(pool: ThreadPoolExecutor, encode: Callable[[str], Encoded], names: list[str]) -> Iterator[Encoded]:
    """The results for the names, of which the next one is always under way."""
    upcoming = None
    for name in names:
        current, upcoming = upcoming, pool.submit(encode, name)
        if current is not None:
            yield current.result()
    if upcoming is not None:
        yield upcoming.result()
