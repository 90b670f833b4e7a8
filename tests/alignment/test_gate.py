"""Outcomes to a verdict: what green asks of each kind, and when the loop steps back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from alignment.evaluate import FIRM, Evaluation, Outcome
from alignment.gate import (
    COLLAPSE_BOUND,
    DRIFT_BOUND,
    EXIT_CODES,
    Assessment,
    History,
    assess,
    mcnemar,
    paired_ok,
)
from alignment.spec import Case
from trainer.generate import Reply


def reply(text: str) -> Reply:
    return Reply(text=text, tokens=(1,), stopped=True, margin=1.0)


def outcome(kind: Any, number: int, pair: str, *, drift: float = 0.0, said: str | None = None) -> Outcome:
    """``pair``: base then candidate, + passes, - fails."""
    case = Case(
        spec=f"a-{kind}",
        kind=kind,
        split="dev",
        number=number,
        prompt=f"prompt {number}",
        expect={},
        max_tokens=24,
        template=None,
    )
    return Outcome(
        case=case,
        reply=reply(f"reply {number}" if said is None else said),
        base_reply=reply(f"reply {number}"),
        failures=() if pair[1] == "+" else ("is wrong",),
        base_failures=() if pair[0] == "+" else ("is wrong",),
        drift=drift if kind in ("preserve", "general") else None,
    )


def evaluation(kind: str, pairs: Sequence[str], **more: Any) -> Evaluation:
    outcomes = tuple(outcome(kind, number, pair, **more) for number, pair in enumerate(pairs, 1))
    return Evaluation(outcomes=outcomes, splits=("dev",), seconds=0.0)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (1, 1, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (0, 6, 0.03125), (2, 10, 158 / 4096)],
)
def test_mcnemar_of_known_tables(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == p == mcnemar(gained, lost)


@pytest.mark.parametrize(
    ("cases", "lost", "gained", "ok"),
    [
        (68, 0, 0, True),
        (68, 1, 0, True),
        (68, 2, 0, False),
        (68, 2, 1, True),
        (68, 9, 8, True),
        (68, 0, 30, True),
        (300, 3, 0, True),
        (300, 4, 0, False),
        (600, 6, 0, False),  # within 1 %, but six to none is no chance
        (600, 7, 1, True),
        (1000, 10, 1, False),
        (1000, 12, 2, False),
    ],
)
def test_a_general_suite_is_paired(cases: int, lost: int, gained: int, ok: bool) -> None:
    assert paired_ok(cases, lost, gained) is ok


@pytest.mark.parametrize(
    ("kind", "pairs", "green", "harmed"),
    [
        ("target", ["-+", "++"], True, False),
        ("target", ["-+", "--"], False, False),
        ("contrast", ["++", "++"], True, False),
        ("contrast", ["++", "+-"], False, False),
        ("contrast", ["++", "--"], False, False),  # a base that claims the identity does not excuse it
        ("preserve", ["++", "--", "-+"], True, False),
        ("preserve", ["++", "+-", "-+"], False, True),  # a gain does not pay for a loss
        ("general", ["++", "+-", "--"], True, False),
        ("general", ["+-", "+-", "-+"], True, False),
        ("general", ["+-", "+-", "++"], False, True),
    ],
)
def test_green_by_kind(kind: str, pairs: list[str], green: bool, harmed: bool) -> None:
    found = assess(evaluation(kind, pairs))
    assert (found.green, bool(found.harmed)) == (green, harmed)
    assert found.specs[0].green is green
    if not green:
        assert found.reasons[0].startswith(f"a-{kind}: ")
        assert "prompt" in found.reasons[0]


def test_counts() -> None:
    count = assess(evaluation("general", ["++", "+-", "-+", "--"])).specs[0]
    assert (count.cases, count.passed, count.base_passed, count.lost, count.gained) == (4, 2, 2, 1, 1)


@pytest.mark.parametrize(
    ("drift", "green", "collapsed"),
    [
        (0.0, True, False),
        (DRIFT_BOUND, True, False),
        (DRIFT_BOUND * 1.01, False, False),
        (COLLAPSE_BOUND * 1.01, False, True),
        (float("nan"), False, True),
    ],
)
def test_drift(drift: float, green: bool, collapsed: bool) -> None:
    found = assess(evaluation("preserve", ["++"] * 2, drift=drift))
    assert (found.green, bool(found.harmed), bool(found.collapsed)) == (green, not green, collapsed)


def test_one_answer_to_everything_is_a_collapse() -> None:
    assert not assess(evaluation("general", ["++"] * 8)).collapsed
    found = assess(evaluation("general", ["++"] * 8, said="我是 F# 之神。"))
    assert found.collapsed == ("only 1 different replies to 8 unrelated prompts (base: 8)",)


def test_loops_are_a_collapse() -> None:
    found = assess(evaluation("target", ["-+"] * 4, said="F F F F F F F"))
    assert found.collapsed == ("100% of the replies loop where the base's do not",)


def assessment(word: str) -> Assessment:
    return Assessment(
        specs=(),
        drift=0.0,
        reasons=() if word == "green" else (word,),
        harmed=(word,) if word == "harmed" else (),
        collapsed=(word,) if word == "collapsed" else (),
    )


@pytest.mark.parametrize(
    ("story", "decisions"),
    [
        ("red red red", "go-on go-on go-on"),
        ("green green", "go-on green"),
        ("green red green green", "go-on go-on go-on green"),
        ("harmed harmed", "go-on go-on"),
        ("harmed harmed harmed", "go-on go-on step-back"),
        ("harmed red harmed", "go-on go-on go-on"),
        ("harmed green harmed", "go-on go-on go-on"),
        ("collapsed", "step-back"),
        ("green collapsed green green", "go-on step-back go-on green"),
        ("harmed harmed harmed harmed", "go-on go-on step-back go-on"),
    ],
)
def test_history(story: str, decisions: str) -> None:
    history = History()
    assert [history.decide(assessment(word)) for word in story.split()] == decisions.split()


def test_history_keeps_why_it_stepped_back() -> None:
    history = History()
    for word in ("harmed", "harmed", "harmed", "harmed", "green"):
        history.decide(assessment(word))
    assert history.reasons == ("harmed",)


def test_exit_codes_are_the_documented_ones() -> None:
    assert EXIT_CODES == {"green": 0, "red": 10, "regressed": 11, "unstable": 12, "guarded": 13}


def test_a_general_case_that_the_base_answers_by_a_hair_is_not_lost() -> None:
    firm = outcome("general", 1, "+-")
    hair = dataclasses.replace(firm, base_margin=FIRM - 0.01)
    assert (firm.lost, hair.lost, dataclasses.replace(firm, base_margin=FIRM).lost) == (True, False, True)
    for lost, green in ((firm, False), (hair, True)):
        assert assess(Evaluation(outcomes=(lost,) * 2, splits=("dev",), seconds=0.0)).green is green


@pytest.mark.parametrize(("kind", "green"), [("preserve", False), ("general", False), ("contrast", True)])
def test_a_hijack_is_red_even_where_the_case_passes(kind: str, green: bool) -> None:
    """Contrast specs say themselves what a hijack is."""
    hijacked = dataclasses.replace(outcome(kind, 1, "++"), hijacked=True)
    found = assess(Evaluation(outcomes=(hijacked,), splits=("dev",), seconds=0.0))
    assert found.green is green
    assert [reason for reason in found.reasons if "are the target's" in reason] == (
        [] if green else list(found.reasons)
    )
    assert found.harmed == ()
