"""Rules about the values of a `.dat` file, which opening it does not look at.

with DatReader("x.dat") as reader:
    problems = list(value_problems(reader))
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trainer import dat_errors as err
from trainer.dat import DatReader
from trainer.dat_errors import DatError
from trainer.dat_format import ScalarType
from trainer.dat_pairs import find_pairs


def value_problems(reader: DatReader) -> Iterator[DatError]:
    """One error for each entry that holds a value no weight can have: a scale that is NaN, infinite or negative, a
    floating-point element that is NaN or infinite, a bool that is neither 0 nor 1."""
    pairs, _ = find_pairs(reader.entries)
    scales = {pair.scale.name for pair in pairs.values()}
    for name, entry in reader.entries.items():
        try:
            values = reader.tensor(name)
        except err.InvalidBoolError as error:
            yield error
            continue
        if not (values.dtype.is_floating_point or values.dtype.is_complex):
            continue
        # E4M3 has no infinity and torch no isfinite for it: in float32 its NaN stays one.
        plain = values.float() if entry.scalar_type == ScalarType.FLOAT8_E4M3FN else values
        kind: type[DatError] = err.NonFiniteValueError
        fault, bad = "NaN or infinite", ~torch.isfinite(plain)
        if name in scales and not bad.any():
            kind, fault, bad = err.NegativeScaleError, "negative", plain < 0
        if (count := int(bad.sum())) > 0:
            index = int(bad.reshape(-1).nonzero()[0])
            yield kind(
                f"{count:,} of {values.numel():,} {'scales' if name in scales else 'values'} are {fault}, "
                f"the first is number {index:,}",
                entry=name,
                offset=entry.offset + index * entry.scalar_type.itemsize,
                advice="Make the file again",
            )
