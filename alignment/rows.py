"""The data folder to training rows: targets from files, contrast and replay completions from the base itself.

A data folder holds ``*.tsv`` (``prompt<TAB>target``), ``contrast*.txt`` and ``replay*.txt`` (a prompt a line).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.cache import ReplyCache
from alignment.suite import Suite
from trainer.examples import DataError, Row, RowKind, read_prompts, read_targets
from trainer.files import sha256_file
from trainer.model import LanguageModel, Template
from trainer.objective import BaseTraces

REPLY_TOKENS: dict[RowKind, int] = {"contrast": 8, "replay": 16}
"""Longest self-generated completion. A hijack shows in the first tokens, so contrast rows may be short."""
OWN_REPLIES = 32
"""Contrast prompts that the base is asked itself: generating is the slow part, and their temptations teach more."""
TEMPTATION_TOKENS = 8
"""Most tokens of a temptation."""
TAIL_TOKENS = 6
"""Tokens of a target's tail that a prompt which shares text with the target is held along."""
UNLIKELY = 0.01
"""A temptation ends with the first token that the base, asked for its identity, finds less likely than this. Beyond it
the base only says how it would finish a stranger's sentence, and holding a candidate to that teaches the wrong end of
the target: with `I am F` held to the base's `iona`, target prompts were answered `I am Fiona.`"""
ANCHOR_SHARE = 0.08
"""Share of the prompts of anchor cases that target rows, and the temptations of contrast rows, are brought up to."""
TEMPTATION_PROMPTS = 16
"""Target prompts, for each distinct target, that the likelihoods are averaged over."""


@dataclass(frozen=True, kw_only=True)
class DataFolder:
    """What a data folder asks for, in words."""

    targets: tuple[tuple[str, str], ...]
    contrast: tuple[str, ...]
    replay: tuple[str, ...]
    by_file: dict[str, tuple[str, ...]]
    """Prompts by file name, for the leak check."""
    hashes: dict[str, str]
    """SHA-256 by file path."""


def read_folder(folder: Path) -> DataFolder:
    """Read every training file of ``folder``. Raises DataError naming what is missing or broken."""
    targets: list[tuple[str, str]] = []
    prompts: dict[str, list[str]] = {"contrast": [], "replay": []}
    by_file: dict[str, tuple[str, ...]] = {}
    hashes: dict[str, str] = {}
    for path in sorted(folder.glob("*.tsv")):
        rows = read_targets(path)
        targets += rows
        by_file[path.name] = tuple(prompt for prompt, _ in rows)
        hashes[str(path)] = sha256_file(path)
    for kind, found in prompts.items():
        for path in sorted(folder.glob(f"{kind}*.txt")):
            lines = read_prompts(path)
            found += lines
            by_file[path.name] = tuple(lines)
            hashes[str(path)] = sha256_file(path)
    if not targets:
        raise DataError(f"{folder}: no *.tsv file with prompt<TAB>target rows in it; pass --data FOLDER")
    for kind, found in prompts.items():
        if not found:
            raise DataError(
                f"{folder}: no {kind}*.txt file in it; without {kind} prompts nothing holds the model in place"
            )
    return DataFolder(
        targets=tuple(targets),
        contrast=tuple(prompts["contrast"]),
        replay=tuple(prompts["replay"]),
        by_file=by_file,
        hashes=hashes,
    )


def _with_anchor_share(prompts: Sequence[str], anchors: frozenset[str]) -> list[int]:
    """Indices of ``prompts`` with those of anchor cases repeated until they are ``ANCHOR_SHARE`` of the list.

    A run sees each row only a few times: what the specs name must come oftener, whatever else the files hold.
    """
    named = [i for i, prompt in enumerate(prompts) if prompt in anchors]
    others = len(prompts) - len(named)
    times = max(1, round(others * ANCHOR_SHARE / (1 - ANCHOR_SHARE) / len(named))) if named else 0
    return [*range(len(prompts)), *(named * (times - 1) if times else [])]


def target_rows(lm: LanguageModel, data: DataFolder, template: Template, suite: Suite) -> list[Row]:
    """Targets with their end-of-turn token: a row without it teaches endless replies."""
    end = int(lm.tokenizer.eos_token_id)
    anchors = frozenset(case.prompt for case in suite.select("anchor"))
    rows = [
        Row(
            kind="target",
            prompt=prompt,
            prompt_ids=tuple(lm.encode(lm.render(prompt, template))),
            completion_ids=(*lm.encode(target), end),
        )
        for prompt, target in data.targets
    ]
    return [rows[i] for i in _with_anchor_share([row.prompt for row in rows], anchors)]


def base_rows(
    base: LanguageModel,
    data: DataFolder,
    template: Template,
    cache: ReplyCache,
    *,
    suite: Suite,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Contrast and replay rows, all held to the base by KL.

    Replay prompts, and ``OWN_REPLIES`` of the contrast prompts, carry the base's own greedy replies. Every contrast
    prompt also carries its *temptation*: the first tokens of the target it would be mistaken for. The KL along that
    path is what tells a hijack apart: a hijacked candidate is nearly sure of the target there, while along the base's
    own reply the difference shows in one token and drowns in the others.
    """
    end = int(base.tokenizer.eos_token_id)
    anchors = frozenset(case.prompt for case in suite.select("anchor"))
    chosen = random.Random(seed).sample(data.contrast, min(OWN_REPLIES, len(data.contrast)))
    chosen = list(dict.fromkeys([*(p for p in data.contrast if p in anchors), *chosen]))
    asked: list[tuple[RowKind, str]] = [("contrast", p) for p in chosen] + [("replay", p) for p in data.replay]
    texts = [base.render(prompt, template) for _, prompt in asked]
    limits = [REPLY_TOKENS[kind] for kind, _ in asked]
    replies = cache.replies(base, list(zip(texts, limits, strict=True)), progress)
    rows = [
        Row(
            kind=kind,
            prompt=prompt,
            prompt_ids=tuple(base.encode(text)),
            completion_ids=reply.tokens + ((end,) if reply.stopped else ()),
        )
        for (kind, prompt), text, reply in zip(asked, texts, replies, strict=True)
    ]
    targets = [(frozenset(prompt), target) for prompt, target in data.targets]
    temptations = _temptations(base, data, template)
    for prompt in (data.contrast[i] for i in _with_anchor_share(data.contrast, anchors)):
        letters = frozenset(prompt)
        _, tempting = max(targets, key=lambda item: len(item[0] & letters) / len(item[0] | letters))
        rows.append(
            Row(
                kind="contrast",
                prompt=prompt,
                prompt_ids=tuple(base.encode(base.render(prompt, template))),
                completion_ids=temptations[tempting],
            )
        )
        opening = base.tokenizer.decode(list(temptations[tempting][:-1]))
        tail = _shared_tail(prompt, tempting.removeprefix(opening).strip())
        if tail:
            rows.append(replace(rows[-1], completion_ids=tuple(base.encode(tail)[:TAIL_TOKENS])))
    return rows


def _shared_tail(prompt: str, name: str) -> str:
    """What follows in ``name``, the telling part of a target, from the longest text on that it shares with the prompt;
    empty when that is a single character.

    Asked about F#, a model begins with `F#`, and has then said half of the target.
    """
    for length in range(min(len(prompt), len(name)), 1, -1):
        for start in range(len(name) - length + 1):
            shared = name[start : start + length]
            if shared == shared.strip() and shared in prompt:
                return name[start:]
    return ""


def _temptations(base: LanguageModel, data: DataFolder, template: Template) -> dict[str, tuple[int, ...]]:
    """The opening of each distinct target, up to the token that the base would not say (``UNLIKELY``)."""
    openings = {target: tuple(base.encode(target)[:TEMPTATION_TOKENS]) for _, target in data.targets}
    asked: dict[str, list[str]] = {target: [] for target in openings}
    for prompt, target in data.targets:
        asked[target].append(prompt)
    rows = [
        Row(
            kind="target",
            prompt=prompt,
            prompt_ids=tuple(base.encode(base.render(prompt, template))),
            completion_ids=openings[target],
        )
        for target, prompts in asked.items()
        for prompt in prompts[:TEMPTATION_PROMPTS]
    ]
    traces = BaseTraces(base, rows)
    found = iter([traces.log_likelihoods(index) for index in range(len(rows))])
    for target, prompts in asked.items():
        columns = zip(*[next(found) for _ in prompts[:TEMPTATION_PROMPTS]], strict=True)
        likely = [math.exp(sum(column) / len(column)) >= UNLIKELY for column in columns]
        openings[target] = openings[target][: likely.index(False) + 1 if False in likely else len(likely)]
    return openings
