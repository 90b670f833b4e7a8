"""The section on the two numerics, from hand-made outcomes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from alignment import disagree, report
from alignment.evaluate import Evaluation, Outcome
from alignment.record import RunRecord
from alignment.spec import Case
from trainer.generate import Reply


def outcome(prompt: str, said: str, *, passed: bool = True, base_passed: bool = True, kind: Any = "target") -> Outcome:
    case = Case(
        spec="who", kind=kind, split="heldout", number=3, prompt=prompt, expect={}, max_tokens=24, template=None
    )
    reply = Reply(text=said, tokens=(1,), stopped=True, margin=1.0)
    return Outcome(
        case=case,
        reply=reply,
        base_reply=reply,
        failures=() if passed else ("no 'F#'",),
        base_failures=() if base_passed else ("bad",),
        drift=None,
    )


def judged(*outcomes: Outcome) -> Evaluation:
    return Evaluation(outcomes=outcomes, splits=("anchor", "dev", "heldout"), seconds=1.0)


def record(final: Evaluation | None, other: Evaluation | None, **config: str) -> RunRecord:
    return RunRecord(
        run="r",
        verdict="green",
        cause="c",
        command="align run",
        started="now",
        base={},
        artifact=None,
        inputs={},
        config=config,
        environment={},
        code={},
        final=final,
        other=other,
    )


HERE = judged(outcome("你是誰", "F# 之神"), outcome("a|b", "F#"), outcome("c", "no", passed=False))
THERE = judged(
    outcome("你是誰", "F# 之神!"), outcome("a|b", "<i>G</i>", passed=False, base_passed=False), outcome("c", "F#")
)


def test_cases_that_differ_are_listed_with_both_replies() -> None:
    assert disagree.lines(record(HERE, THERE), 0.1) == [
        "weights decided. The same file was also asked in w4a4, against the base in w4a4; there it would not be green: "
        "who: 1 of 3 fail, e.g. 'a&#124;b' -&#62; '&#60;i&#62;G&#60;/i&#62;' no 'F#'. "
        "Of 3 cases 2 pass in weights and 2 in w4a4; 2 pass in one and fail in the other:",
        "",
        "| Spec | Case | Prompt | Reply in weights | Reply in w4a4 |",
        "| --- | --- | --- | --- | --- |",
        "| who | heldout 3 | a&#124;b | F# (the base passes) | **failed**: &#60;i&#62;G&#60;/i&#62; (the base fails) |",
        "| who | heldout 3 | c | **failed**: no (the base passes) | F# (the base passes) |",
        "",
    ]


def test_the_run_s_own_numerics_come_first() -> None:
    [text, *_] = disagree.lines(record(HERE, THERE, numerics="w4a4"), 0.1)
    assert text.startswith("w4a4 decided. The same file was also asked in weights")
    data = disagree.data(record(HERE, THERE, numerics="w4a4"))["numerics"]
    assert (data["decided"], data["passed"], data["disagree"]) == ("w4a4", {"w4a4": 2, "weights": 2}, 2)
    assert data["differ"][0]["weights"] == {"reply": THERE.outcomes[1].reply, "failures": ("no 'F#'",)}
    assert "differ" not in disagree.data(record(HERE, THERE), cases=False)["numerics"]


def test_where_none_differs_it_is_said_with_the_counts() -> None:
    same = judged(*(dataclasses.replace(o, drift=0.01) for o in HERE.outcomes[:2]))
    assert disagree.lines(record(judged(*HERE.outcomes[:2]), same), 0.1) == [
        "weights decided. The same file was also asked in w4a4, against the base in w4a4; there it would be green, "
        "too. Of 2 cases 2 pass in weights and 2 in w4a4; no case passes in one and fails in the other.",
        "",
    ]


def test_a_run_that_judged_no_file_says_so(tmp_path: Path) -> None:
    for final in (None, HERE):
        assert disagree.lines(record(final, None), 0.1) == [
            "Not looked at: no exported file was judged in both.",
            "",
        ]
        assert disagree.data(record(final, None)) == {}


def test_report_and_json_have_the_section(tmp_path: Path) -> None:
    text = report.write(record(HERE, THERE), tmp_path).read_text(encoding="utf-8").split("\n")
    at = text.index("## Where the two numerics disagree")
    assert text[at + 2].startswith("weights decided.")
    assert "| who | heldout 3 | c | **failed**: no (the base passes) | F# (the base passes) |" in text
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["numerics"]["passed"] == {"weights": 2, "w4a4": 2}
    assert [row["id"] for row in data["numerics"]["differ"]] == ["who/heldout/3 a|b", "who/heldout/3 c"]
    assert data["numerics"]["differ"][0]["w4a4"]["reply"]["text"] == "<i>G</i>"
