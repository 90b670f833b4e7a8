"""Where the two numerics disagree about a file: the cases that pass in one and fail in the other.

    disagree.lines(record, 0.1)      # for report.md
    disagree.data(record)            # for report.json and the manifest

Decides nothing: the verdict is that of the run's own numerics.
"""

from __future__ import annotations

from typing import Any

from alignment.evaluate import Outcome
from alignment.gate import assess
from alignment.markdown import escape, rows_as_they_are
from alignment.record import RunRecord
from trainer.numerics import other


def pairs(record: RunRecord) -> list[tuple[Outcome, Outcome]]:
    """The outcomes (in the run's numerics, in the other) of each case that passes in one of them only."""
    if record.final is None or record.other is None:
        return []
    both = zip(record.final.outcomes, record.other.outcomes, strict=True)
    return [(here, there) for here, there in both if here.passed != there.passed]


def data(record: RunRecord, *, cases: bool = True) -> dict[str, Any]:
    """``numerics``: what decided, cases passed in each, cases that differ; nothing when only one was looked at."""
    final, second = record.final, record.other
    if final is None or second is None:
        return {}
    names = (record.numerics, other(record.numerics))
    passed = {name: sum(o.passed for o in e.outcomes) for name, e in zip(names, (final, second), strict=True)}
    found: dict[str, Any] = {
        "decided": record.numerics,
        "passed": passed,
        "drift": dict(zip(names, (final.drift, second.drift), strict=True)),
        "cases": len(final.outcomes),
        "disagree": len(pairs(record)),
    }
    if cases:
        found["differ"] = [
            {
                "id": here.case.id,
                **{n: {"reply": o.reply, "failures": o.failures} for n, o in zip(names, two, strict=True)},
            }
            for two in pairs(record)
            for here in two[:1]
        ]
    return {"numerics": found}


def lines(record: RunRecord, bound: float) -> list[str]:
    """The section's Markdown, without its heading."""
    if record.final is None or record.other is None:
        return ["Not looked at: no exported file was judged in both.", ""]
    here, there = record.numerics, other(record.numerics)
    facts = data(record, cases=False)["numerics"]
    second = assess(record.other, drift_bound=bound)
    worth = "it would be green, too" if second.green else f"it would not be green: {escape('; '.join(second.reasons))}"
    text = (
        f"{here} decided. The same file was also asked in {there}, against the base in {there}; there {worth}. "
        f"Of {facts['cases']} cases {facts['passed'][here]} pass in {here} and {facts['passed'][there]} in {there}"
    )
    if not (different := pairs(record)):
        return [f"{text}; no case passes in one and fails in the other.", ""]
    rows = [
        [escape(one.case.spec), f"{one.case.split} {one.case.number}", escape(one.case.prompt), _said(one), _said(two)]
        for one, two in different
    ]
    head = ["Spec", "Case", "Prompt", f"Reply in {here}", f"Reply in {there}"]
    return [f"{text}; {len(rows)} pass in one and fail in the other:", "", *rows_as_they_are(head, rows), ""]


def _said(outcome: Outcome) -> str:
    mark = "" if outcome.passed else "**failed**: "
    base = "the base passes" if outcome.base_passed else "the base fails"
    return f"{mark}{escape(outcome.reply.text)} ({base})"
