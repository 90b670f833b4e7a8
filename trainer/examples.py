"""Training rows: reading, encoding, batching, sampling.

A row is a rendered prompt and the tokens that must follow it. ``target`` rows come from ``prompt<TAB>target`` files;
the completions of ``contrast`` and ``replay`` rows are the base's own replies (the harness generates them), so a data
file holds only their prompts, one a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainer.generate import shared_prefix

RowKind = Literal["target", "contrast", "replay"]


class DataError(Exception):
    """A training file that cannot be used; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training example in tokens."""

    kind: RowKind
    prompt: str
    """The user's words (before rendering)."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Includes the end-of-turn token unless the reply was cut at its limit."""


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def read_targets(path: Path) -> list[tuple[str, str]]:
    """(prompt, target) of a TSV file, with or without the header ``prompt<TAB>target``. Raises DataError."""
    rows: list[tuple[str, str]] = []
    for number, line in _lines(path):
        fields = line.split("\t")
        if len(fields) != 2 or not all(field.strip() for field in fields):
            raise DataError(f"{path}:{number}: expected prompt<TAB>target, found {len(fields)} field(s)")
        prompt, target = (field.strip() for field in fields)
        if number == 1 and (prompt.lower(), target.lower()) == ("prompt", "target"):
            continue
        rows.append((prompt, target))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are skipped. Raises DataError."""
    prompts = [line.strip() for _, line in _lines(path)]
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    return prompts


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded rows. Causal attention alone keeps padding out of sight of real tokens, so no mask is needed."""

    ids: Tensor
    """[rows, width] int64."""
    where: Tensor
    """[targets, 2] int64: row and position whose output predicts each target."""
    targets: Tensor
    """[targets] int64 token ids."""
    rows: tuple[int, ...]
    """Indices of the rows in the list given to ``batches``."""
    shared: int
    """Leading tokens that all rows have in common and that predict no target."""


def collate(rows: Sequence[Row], indices: Sequence[int], pad_id: int, device: torch.device) -> Batch:
    """One batch of the given rows."""
    width = max(len(rows[i].prompt_ids) + len(rows[i].completion_ids) for i in indices)
    ids = torch.full((len(indices), width), pad_id)
    where: list[tuple[int, int]] = []
    targets: list[int] = []
    for slot, index in enumerate(indices):
        row = rows[index]
        tokens = row.prompt_ids + row.completion_ids
        ids[slot, : len(tokens)] = torch.tensor(tokens)
        first = len(row.prompt_ids) - 1
        where.extend((slot, first + k) for k in range(len(row.completion_ids)))
        targets.extend(row.completion_ids)
    return Batch(
        ids=ids.to(device),
        where=torch.tensor(where).to(device),
        targets=torch.tensor(targets).to(device),
        rows=tuple(indices),
        shared=shared_prefix([rows[i].prompt_ids for i in indices]),
    )


def batches(
    rows: Sequence[Row], indices: Sequence[int], pad_id: int, device: torch.device, tokens: int
) -> Iterator[Batch]:
    """The given rows in batches of like length, each of at most ``tokens`` padded tokens (or one row)."""
    order = sorted(indices, key=lambda i: (len(rows[i].prompt_ids) + len(rows[i].completion_ids), i))
    group: list[int] = []
    for index in order:
        width = len(rows[index].prompt_ids) + len(rows[index].completion_ids)
        if group and (len(group) + 1) * width > tokens:
            yield collate(rows, group, pad_id, device)
            group = []
        group.append(index)
    if group:
        yield collate(rows, group, pad_id, device)


class Sampler:
    """Endless indices of a list, every one once a round, in an order drawn from ``seed``."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._generator = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices (fewer only when the list is empty)."""
        taken: list[int] = []
        while self._count and len(taken) < count:
            if not self._queue:
                self._queue = torch.randperm(self._count, generator=self._generator).tolist()
            taken.append(self._queue.pop())
        return taken
