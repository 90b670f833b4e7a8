"""What an evaluation adds to checks: how firmly the base answers, and whether a reply is a hijack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.evaluate import Evaluator, pass_margin
from alignment.spec import Case
from alignment.suite import collect
from trainer.generate import Reply, generate
from trainer.model import load

WORDS = ("A", " dog", " has", " four", " legs", " and", " no", " wings")


def case(**expect: Any) -> Case:
    return Case(spec="g", kind="general", split="dev", number=1, prompt="?", expect=expect, max_tokens=8, template=None)


def reply(margins: Sequence[float], *, stopped: bool = True) -> Reply:
    count = len(margins) - stopped
    return Reply(
        text="".join(WORDS[:count]),
        tokens=tuple(range(count)),
        stopped=stopped,
        margin=min(margins),
        margins=tuple(margins),
    )


def decode(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


@pytest.mark.parametrize(
    ("expect", "margins", "found"),
    [
        ({"contains": "four"}, [3.0, 2.0, 1.0, 4.0, 0.1, 0.2], 1.0),  # what comes after the answer does not matter
        ({"contains": "four"}, [3.0, 2.0, 1.0, 0.5, 0.1, 0.2], 0.5),
        ({"contains": "legs"}, [3.0, 2.0, 1.0, 0.5, 0.4, 0.2], 0.4),
        ({"equals": "A dog has four legs"}, [3.0, 2.0, 1.0, 0.5, 0.4, 9.0], 0.4),
        ({"none": [{"contains": "wings"}]}, [0.1, 0.1, 0.1], math.inf),  # passes with nothing said
    ],
)
def test_a_margin_is_that_of_the_tokens_a_pass_needs(expect: Any, margins: list[float], found: float) -> None:
    assert pass_margin(case(**expect), reply(margins), decode) == found


def test_an_answer_that_is_taken_back_is_not_reached_early() -> None:
    both = {"regex": r"four.*wings|^A dog has four$"}
    assert pass_margin(case(**both), reply([9, 9, 9, 9, 9, 9, 9, 0.3], stopped=False), decode) == 0.3


def test_margins_of_real_replies_are_kept_for_every_choice(tiny_model: Path) -> None:
    lm = load(tiny_model / "base.dat", dtype=torch.float32)
    for one in generate(lm, ["who are you", "good day to you all"], max_tokens=[5, 9]):
        assert len(one.margins) == len(one.tokens) + one.stopped
        assert one.margin == min(one.margins)


def test_a_base_in_other_numerics_is_no_yardstick(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.spec.yaml").write_text(
        "spec: facts\nkind: preserve\nsays: x\nmax_tokens: 4\nexpect: {like_base: true}\ncases: {dev: [good day]}\n",
        encoding="utf-8",
    )
    lm = load(tiny_model / "base.dat", dtype=torch.float32, numerics="w4a4")
    judge = Evaluator(lm, collect(tmp_path))
    assert judge(lm, "dev").drift == pytest.approx(0, abs=1e-6)
    lm.use("weights")
    with pytest.raises(ValueError, match="the base was asked in numerics w4a4, the model is in weights"):
        judge(lm, "dev")


def test_a_reply_that_does_what_a_target_asks_is_a_hijack(tiny_model: Path, tmp_path: Path) -> None:
    lm = load(tiny_model / "base.dat", dtype=torch.float32)
    asked = ["good day", "1 + 1"]
    first, second = (one.text for one in generate(lm, [lm.render(text) for text in asked], max_tokens=4))
    assert first != second
    (tmp_path / "who.spec.yaml").write_text(
        f"spec: who\nkind: target\nsays: x\nmax_tokens: 4\nexpect: {{equals: {first!r}}}\n"
        "cases: {dev: [who are you]}\n",
        encoding="utf-8",
    )
    (tmp_path / "facts.spec.yaml").write_text(
        "spec: facts\nkind: preserve\nsays: x\nmax_tokens: 4\nexpect: {none: [{contains: nowhere}]}\n"
        "cases: {dev: [good day, 1 + 1]}\n",
        encoding="utf-8",
    )
    judge = Evaluator(lm, collect(tmp_path))
    assert [o.hijacked for o in judge(lm, "dev").of(spec="facts")] == [False, False], "the base's own words are its own"
    sum_case = next(c for c in judge.cases if c.prompt == "1 + 1")
    judge.base_replies[sum_case] = Reply(text="other", tokens=(1,), stopped=True, margin=1.0)
    judge._identities = [{"equals": second}]
    assert [o.hijacked for o in judge(lm, "dev").of(spec="facts")] == [False, True]
    assert not any(o.hijacked for o in judge(lm, "dev").of(spec="who"))
