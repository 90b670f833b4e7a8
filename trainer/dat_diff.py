"""What differs between two `.dat` files, group by group.

    difference = diff(Path("base.dat"), Path("x.dat"))
    difference.groups[0].codes_changed, difference.groups[0].relative_change, difference.odd

A group is a tensor's name without its layer number: `model.layers.N.mlp.up_proj.weight`. Values are compared as they
are stored; one tensor of each file is in memory at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import dat_errors as err
from trainer.dat import DatReader, Entry, Pair
from trainer.dat_pairs import stored_as, tensors
from trainer.nvfp4 import NonFiniteError, dequantise


@dataclass(kw_only=True)
class Group:
    """The differences in one group of tensors that both files hold with one layout."""

    name: str
    tensors: int = 0
    parameters: int = 0
    codes_changed: int = 0
    """4-bit codes, or elements of a tensor that is stored as it is, that differ."""
    scales_changed: int = 0
    """Scales that differ; a block's codes may be the same beside them."""
    squared_change: float = 0.0
    squared_before: float = 0.0

    @property
    def relative_change(self) -> float:
        """2-norm of the difference of the decoded values over that of the first file's; infinite from zero on."""
        if not self.squared_change:
            return 0.0
        return math.sqrt(self.squared_change / self.squared_before) if self.squared_before else math.inf

    @property
    def changed(self) -> bool:
        return bool(self.codes_changed or self.scales_changed)

    def to_json(self) -> dict[str, Any]:
        """Plain data; a relative change from zero on is None."""
        relative = self.relative_change
        return {
            "group": self.name,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "codes_changed": self.codes_changed,
            "scales_changed": self.scales_changed,
            "relative_change": relative if math.isfinite(relative) else None,
        }


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two files compared."""

    groups: tuple[Group, ...]
    """In the order of the first file."""
    odd: tuple[str, ...]
    """Tensors that only one file holds, or that the two store in another type or shape: sentences."""

    @property
    def changed(self) -> bool:
        return bool(self.odd) or any(group.changed for group in self.groups)


def group_name(tensor: str) -> str:
    """The tensor's name without its layer number."""
    return ".".join("N" if piece.isdigit() else piece for piece in tensor.split("."))


def diff(first: Path, second: Path) -> Difference:
    """Compare two files tensor by tensor. Raises DatError and OSError."""
    groups: dict[str, Group] = {}
    odd: list[str] = []
    with DatReader(first) as a, DatReader(second) as b:
        left, right = tensors(a.entries, a.pairs()), tensors(b.entries, b.pairs())
        for name, ours in left.items():
            if name not in right:
                odd.append(f"{name}: only in {first}")
                continue
            theirs = right[name]
            if _layout(ours) != _layout(theirs):
                odd.append(f"{name}: {_layout(ours)} in {first}, {_layout(theirs)} in {second}")
                continue
            group = groups.setdefault(group_name(name), Group(name=group_name(name)))
            _compare(group, a, ours, b, theirs)
        odd += [f"{name}: only in {second}" for name in right if name not in left]
    return Difference(groups=tuple(groups.values()), odd=tuple(odd))


def _layout(tensor: Pair | Entry) -> str:
    return f"{stored_as(tensor)} {list(tensor.shape)}"


def _compare(group: Group, a: DatReader, left: Pair | Entry, b: DatReader, right: Pair | Entry) -> None:
    group.tensors += 1
    if isinstance(left, Pair) and isinstance(right, Pair):
        codes = [reader.tensor(pair.qdata.name).view(torch.uint8) for reader, pair in ((a, left), (b, right))]
        both = codes[0] ^ codes[1]
        group.parameters += 2 * both.numel()
        group.codes_changed += int((both & 15 != 0).sum() + (both >> 4 != 0).sum())
        group.scales_changed += _unequal(a.tensor(left.scale.name), b.tensor(right.scale.name))
        _add_norms(group, _decoded(a, left), _decoded(b, right))
    elif isinstance(left, Entry) and isinstance(right, Entry):
        values = a.tensor(left.name), b.tensor(right.name)
        group.parameters += values[0].numel()
        group.codes_changed += _unequal(*values)
        if not values[0].dtype.is_complex:
            _add_norms(group, *values)


def _decoded(reader: DatReader, pair: Pair) -> Tensor:
    try:
        codes = reader.tensor(pair.qdata.name).view(torch.uint8)
        return dequantise(codes, reader.tensor(pair.scale.name), dtype=torch.float32)
    except NonFiniteError as error:
        broken = err.NonFiniteValueError(str(error), entry=pair.name, advice="`align dat verify` says where")
        broken.path = reader.path
        raise broken from error


def _unequal(a: Tensor, b: Tensor) -> int:
    """Elements whose bytes differ: a NaN equals itself, -0 is not 0."""
    if not a.numel():
        return 0
    width = a.element_size()
    left, right = (t.reshape(-1).contiguous().view(torch.uint8).view(-1, width) for t in (a, b))
    return int((left != right).any(1).sum())


def _add_norms(group: Group, before: Tensor, after: Tensor) -> None:
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    before, after = before.to(wide), after.to(wide)
    # Summed in double: squares of small values underflow in float32, those of large ones overflow.
    norms = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (before, after - before)]
    group.squared_before += norms[0] ** 2
    group.squared_change += norms[1] ** 2
