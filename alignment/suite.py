"""The suite: every spec of a folder, its splits, its hash, and the leak check.

    suite = collect(Path("specs"))
    suite.select("dev", "heldout")
    refuse_leaks(suite, {"data/identity.tsv": prompts})

A training prompt that is also a dev or held-out prompt, or nearly so, is refused: it would prove nothing.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from alignment.spec import Case, Kind, Spec, SpecError, Split, load

LEAK_BOUND = 0.6
"""Jaccard overlap of character trigrams at which two prompts count as the same question."""


class LeakError(SpecError):
    """A prompt that the harness must never train on stands in the training data."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """All specs, in the order of their names."""

    folder: Path
    specs: tuple[Spec, ...]
    sha256: str
    """Over the names and bytes of the spec files."""

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(case for spec in self.specs for case in spec.cases)

    def select(self, *splits: Split) -> tuple[Case, ...]:
        """The cases of the given splits, in suite order."""
        return tuple(case for case in self.cases if case.split in splits)

    def kinds(self) -> dict[str, Kind]:
        """Kind of each spec by name."""
        return {spec.name: spec.kind for spec in self.specs}


def collect(folder: Path) -> Suite:
    """Load every ``*.spec.yaml`` of ``folder``. Raises SpecError: none, a broken one, a repeated name or prompt."""
    paths = sorted(folder.glob("*.spec.yaml"))
    if not paths:
        raise SpecError(f"{folder}: no *.spec.yaml file in it; write one (README, 'A spec') or pass --specs FOLDER")
    specs = tuple(load(path) for path in paths)
    names = Counter(spec.name for spec in specs)
    for spec in specs:
        if names[spec.name] > 1:
            raise SpecError(
                f"{spec.path}: the name {spec.name!r} is used by {names[spec.name]} files; names are unique"
            )
    seen: dict[tuple[str, str | None], Case] = {}
    for case in (case for spec in specs for case in spec.cases):
        other = seen.setdefault((case.prompt, case.template), case)
        if other is not case:
            raise SpecError(f"{folder}: the prompt {case.prompt!r} stands twice: {other.id!r} and {case.id!r}")
    digest = sha256()
    for path in paths:
        digest.update(f"{path.name} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    return Suite(folder=folder, specs=specs, sha256=digest.hexdigest())


def bare(text: str) -> str:
    """``text`` under NFKC and case folding, letters, digits and symbols only (no punctuation, no spaces)."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in plain if unicodedata.category(c)[0] in "LNSM")


def overlap(a: str, b: str) -> float:
    """Jaccard overlap of the two bare texts' character trigrams (of the texts themselves when shorter), 0 to 1."""
    left, right = (_grams(bare(text)) for text in (a, b))
    return len(left & right) / len(left | right) if left | right else 1.0


def _grams(text: str) -> frozenset[str]:
    return frozenset(text[i : i + 3] for i in range(max(1, len(text) - 2)))


def leaks(cases: Iterable[Case], prompts: Mapping[str, Iterable[str]], *, bound: float = LEAK_BOUND) -> list[str]:
    """One line for every dev or held-out prompt that equals or nearly equals a training prompt (by file name)."""
    known = [(source, prompt, _grams(bare(prompt))) for source, group in prompts.items() for prompt in group]
    found: list[str] = []
    for case in cases:
        if case.split == "anchor":
            continue
        grams = _grams(bare(case.prompt))
        for source, prompt, other in known:
            share = len(grams & other) / len(grams | other)
            if share >= bound:
                found.append(f"{case.id!r} and {prompt!r} of {source} (overlap {share:.2f})")
    return found


def refuse_leaks(suite: Suite, prompts: Mapping[str, Iterable[str]]) -> None:
    """Raise LeakError when training data holds a dev or held-out prompt, or one nearly equal to it."""
    found = leaks(suite.cases, prompts)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise LeakError(
            f"{len(found)} dev or held-out prompt(s) stand in the training data: {'; '.join(found[:5])}{more}. "
            "A prompt that steers or judges a run must not be trained on: move the row out, or the case to the anchors"
        )
