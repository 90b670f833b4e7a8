"""A suite on a model: all replies in one batched pass, then every judgement, paired with the base's own.

    judge = Evaluator(base, suite)
    evaluation = judge(candidate_lm, "anchor", "dev")
    evaluation.outcomes[0].passed, .failures, .reply, .base_reply

Preserve and general cases also measure KL(base || candidate) per token on the base's own replies. Base and model are in
the same numerics, or nothing is judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from alignment.cache import ReplyCache
from alignment.match import Said, failures, looping
from alignment.spec import Case, Split
from alignment.suite import Suite
from trainer.examples import Row
from trainer.generate import Reply, generate
from trainer.model import LanguageModel, Template
from trainer.objective import BaseTraces

Progress = Callable[[int, int], None]

FIRM = 0.5
"""Least margin, nats, of a base's answer to a general case that a candidate can lose.

A drift of KL nats a token moves a choice between two even tokens by sqrt(8 KL). So 0.5 is what 0.03 nats do, a third of
the drift allowed: an answer decided more narrowly says which way the base's rounding fell, not what the base knows."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a model said to one case, and what that is worth."""

    case: Case
    reply: Reply
    base_reply: Reply
    failures: tuple[str, ...]
    """Why the reply fails; empty when it passes."""
    base_failures: tuple[str, ...]
    drift: float | None
    """KL(base || candidate) per token on the base's reply, nats; None for target and contrast cases."""
    base_margin: float = math.inf
    """General cases: by how much (nats) the base decided its narrowest token on the way to a passing reply."""

    hijacked: bool = False
    """A reply outside the target specs that satisfies one of them, where the base's does not."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong with the reply."""
        return self.failures + (("is what a target spec asks for",) if self.hijacked else ())

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def base_passed(self) -> bool:
        return not self.base_failures

    @property
    def firm(self) -> bool:
        """The base passes, and not by a hair (``FIRM``): there is something to keep."""
        return self.base_passed and self.base_margin >= FIRM

    @property
    def lost(self) -> bool:
        """The base passes firmly and the candidate does not."""
        return self.firm and not self.passed

    @property
    def gained(self) -> bool:
        """The candidate passes and the base does not."""
        return self.passed and not self.base_passed

    @property
    def changed(self) -> bool:
        return self.reply.text != self.base_reply.text


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All outcomes of one model on some splits, in suite order."""

    outcomes: tuple[Outcome, ...]
    splits: tuple[Split, ...]
    seconds: float

    def of(self, *, kind: str | None = None, spec: str | None = None, split: str | None = None) -> tuple[Outcome, ...]:
        """The outcomes of a kind, a spec or a split."""
        return tuple(
            o
            for o in self.outcomes
            if (kind is None or o.case.kind == kind)
            and (spec is None or o.case.spec == spec)
            and (split is None or o.case.split == split)
        )

    @property
    def drift(self) -> float:
        """Mean KL(base || candidate) per token, nats, over preserve and general cases the base passes (0: none).

        Where the base itself fails there is nothing to keep: far from nonsense is not harm.
        """
        values = [o.drift for o in self.outcomes if o.drift is not None and o.base_passed]
        return sum(values) / len(values) if values else 0.0

    @property
    def looping(self) -> float:
        """Share of replies that are stuck in a loop where the base's is not."""
        stuck = [looping(o.reply.text) and not looping(o.base_reply.text) for o in self.outcomes]
        return sum(stuck) / len(stuck) if stuck else 0.0


def pass_margin(case: Case, reply: Reply, decode: Callable[[Sequence[int]], str]) -> float:
    """The smallest margin, nats, of the tokens that a passing reply of a base needs to pass; infinity if it needs none.

    A reply needs its tokens up to the first from which on all its beginnings pass.
    """
    needed = len(reply.tokens) + reply.stopped
    for length in range(len(reply.tokens), -1, -1):
        text = decode(reply.tokens[:length])
        cut = Reply(text=text, tokens=reply.tokens[:length], stopped=False, margin=reply.margin)
        if judge_reply(case, cut, reply):
            break
        needed = length
    return min(reply.margins[:needed], default=math.inf)


def judge_reply(case: Case, reply: Reply, base: Reply | None) -> tuple[str, ...]:
    """Why ``reply`` fails the checks of ``case``; empty when it passes."""
    said = Said(text=reply.text, stopped=reply.stopped, base=base.text if base else None)
    return tuple(failures(cast("dict[str, Any]", case.expect), said))


class Evaluator:
    """A suite with the base's own replies and states, ready to judge candidates again and again."""

    def __init__(
        self,
        base: LanguageModel,
        suite: Suite,
        *,
        splits: Sequence[Split] = ("anchor", "dev", "heldout"),
        template: Template = "chat",
        cache: ReplyCache | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Generate (or take from ``cache``) the base's replies to ``splits``, and its states for the drift."""
        self.template = template
        self.numerics = base.numerics
        self.cases = suite.select(*splits)
        self.cache = cache
        self.base_replies = dict(zip(self.cases, self.replies(base, self.cases, progress), strict=True))
        self._eos = base.tokenizer.eos_token_id
        asked: list[dict[str, Any]] = [
            cast("dict[str, Any]", case.expect) for case in suite.cases if case.kind == "target"
        ]
        self._identities = [expect for i, expect in enumerate(asked) if expect not in asked[:i]]

        def decode(tokens: Sequence[int]) -> str:
            text: str = base.tokenizer.decode(list(tokens), skip_special_tokens=True)
            return text

        self._margins = {
            case: pass_margin(case, reply, decode)
            for case, reply in self.base_replies.items()
            if case.kind == "general"
        }
        measured = [case for case in self.cases if case.kind in ("preserve", "general")]
        self._drift_index = {case: index for index, case in enumerate(measured)}
        self._traces = BaseTraces(base, [self._row(base, case) for case in measured])

    def _hijacked(self, case: Case, reply: Reply) -> bool:
        """Whether a reply outside the target specs does what one of them asks, and the base's own reply does not."""
        if case.kind == "target":
            return False
        said, before = (
            Said(text=r.text, stopped=r.stopped, base=self.base_replies[case].text)
            for r in (reply, self.base_replies[case])
        )
        return any(not failures(expect, said) and bool(failures(expect, before)) for expect in self._identities)

    def _row(self, base: LanguageModel, case: Case) -> Row:
        reply = self.base_replies[case]
        return Row(
            kind="replay",
            prompt=case.prompt,
            prompt_ids=tuple(base.encode(self.render(base, case))),
            completion_ids=reply.tokens + ((self._eos,) if reply.stopped else ()),
        )

    def render(self, lm: LanguageModel, case: Case) -> str:
        """The case's prompt as the model reads it."""
        return lm.render(case.prompt, cast(Template, case.template or self.template))

    def replies(self, lm: LanguageModel, cases: Sequence[Case], progress: Progress | None = None) -> list[Reply]:
        """Replies of ``lm`` in the order of ``cases``; only unmodified files go through the cache."""
        prompts = [(self.render(lm, case), case.max_tokens) for case in cases]
        if self.cache is not None:
            return self.cache.replies(lm, prompts, progress)
        return generate(
            lm, [text for text, _ in prompts], max_tokens=[limit for _, limit in prompts], progress=progress
        )

    def __call__(
        self, lm: LanguageModel, *splits: Split, cached: bool = False, progress: Progress | None = None
    ) -> Evaluation:
        """Judge ``lm`` on ``splits``. ``cached`` only for a model whose parameters are those of its file.

        Raises ValueError for a model in other numerics than the base was in: the difference would count as the model's.
        """
        if lm.numerics != self.numerics:
            raise ValueError(f"the base was asked in numerics {self.numerics}, the model is in {lm.numerics}")
        started = time.monotonic()
        cases = [case for case in self.cases if case.split in splits]
        if cached and self.cache is not None:
            replies = self.replies(lm, cases, progress)
        else:
            texts = [self.render(lm, case) for case in cases]
            replies = generate(lm, texts, max_tokens=[case.max_tokens for case in cases], progress=progress)
        wanted = [self._drift_index[case] for case in cases if case in self._drift_index]
        drifts = self._traces.drift(lm, wanted)
        outcomes = tuple(
            Outcome(
                case=case,
                reply=reply,
                base_reply=self.base_replies[case],
                failures=judge_reply(case, reply, self.base_replies[case]),
                base_failures=judge_reply(case, self.base_replies[case], self.base_replies[case]),
                drift=drifts.get(self._drift_index.get(case, -1)),
                base_margin=self._margins.get(case, math.inf),
                hijacked=self._hijacked(case, reply),
            )
            for case, reply in zip(cases, replies, strict=True)
        )
        return Evaluation(outcomes=outcomes, splits=tuple(splits), seconds=time.monotonic() - started)
