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
from trainer.packed import Pack, pack

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
    """Rows of one forward pass."""

    pack: Pack
    where: Tensor
    """[targets] int64: the place in the packed sequence whose output predicts each target."""
    targets: Tensor
    """[targets] int64 token ids."""
    rows: tuple[int, ...]
    """Indices of the rows in the list given to ``batches``."""


def collate(rows: Sequence[Row], indices: Sequence[int], device: torch.device) -> Batch:
    """One batch of the given rows."""
    shared = shared_prefix([rows[i].prompt_ids for i in indices])
    where: list[int] = []
    targets: list[int] = []
    start = shared
    for index in indices:
        row = rows[index]
        first = start + len(row.prompt_ids) - shared - 1
        where.extend(range(first, first + len(row.completion_ids)))
        targets.extend(row.completion_ids)
        start += len(row.prompt_ids) - shared + len(row.completion_ids)
    return Batch(
        pack=pack([rows[i].prompt_ids + rows[i].completion_ids for i in indices], shared, device),
        where=torch.tensor(where, device=device),
        targets=torch.tensor(targets, device=device),
        rows=tuple(indices),
    )


def batches(rows: Sequence[Row], indices: Sequence[int], device: torch.device, tokens: int) -> Iterator[Batch]:
    """The given rows, sorted by length, in batches of at most ``tokens`` tokens (or one row).

    A batch's common opening counts once, as it is computed once.
    """
    lengths = {i: len(rows[i].prompt_ids) + len(rows[i].completion_ids) for i in indices}
    shared = shared_prefix([rows[i].prompt_ids for i in indices]) if lengths else 0
    group: list[int] = []
    filled = shared
    for index in sorted(indices, key=lambda i: (lengths[i], i)):
        if group and filled + lengths[index] - shared > tokens:
            yield collate(rows, group, device)
            group, filled = [], shared
        group.append(index)
        filled += lengths[index] - shared
    if group:
        yield collate(rows, group, device)


class Sampler:
    """Endless indices of a list, every one once a round in an order drawn from ``seed``; hard ones again and again.

    A row whose last loss was above ``hard`` waits in a pool, from which up to the share ``again`` of what is taken
    comes, until its loss falls.
    """

    def __init__(self, count: int, seed: int, *, hard: float = float("inf"), again: float = 0.5) -> None:
        self._count, self._hard, self._again = count, hard, again
        self._generator = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []
        self._pool: dict[int, None] = {}  # in order of arrival: the same run after run

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices, no two alike (fewer only when the list is shorter)."""
        count = min(count, self._count)
        waiting = list(self._pool)
        picks = torch.randperm(len(waiting), generator=self._generator).tolist()[: int(self._again * count)]
        taken = [waiting[i] for i in picks]
        while len(taken) < count:
            if not self._queue:
                self._queue = torch.randperm(self._count, generator=self._generator).tolist()
            index = self._queue.pop()
            if index not in taken:
                taken.append(index)
        return taken

    def learnt(self, index: int, loss: float) -> None:
        """Hear of the loss of a row that was taken."""
        self._pool.pop(index, None)
        if loss > self._hard:
            self._pool[index] = None
