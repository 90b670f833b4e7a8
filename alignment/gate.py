"""Outcomes to a verdict, paired with the base.

``assess`` says what one evaluation is worth; ``History`` turns evaluations over time into the decision of the loop: go
on, green, or step back.

What green asks of each kind:

* target: every case passes.
* contrast: every case passes (no hijack is tolerated).
* preserve: every case that the base passes passes, and the drift is within its bound.
* preserve and general: no reply is what a target spec asks for (a hijack).
* general: paired with the base. A case that the base answers firmly (`alignment.evaluate.FIRM`) and the candidate does
  not is lost, one that only the candidate answers is gained; lost minus gained may be at most one case or 1 % of the
  cases, whichever is more, and must not be significant (exact McNemar, p < 0.05).

Where a base fails a preserve or general case there is nothing to keep: the case counts only when it is gained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # so that the command does not wait for torch to tell an exit code
    from alignment.evaluate import Evaluation, Outcome

Verdict = Literal["green", "red", "regressed", "unstable", "guarded"]
EXIT_CODES: dict[Verdict, int] = {"green": 0, "red": 10, "regressed": 11, "unstable": 12, "guarded": 13}
USAGE_ERROR = 2

DRIFT_BOUND = 0.1
"""Mean KL(base || candidate) on preserve and general prompts, nats a token, above which a candidate is not green."""
COLLAPSE_BOUND = 1.0
"""Drift at which a candidate has collapsed: it is stepped back at once."""
GREENS_IN_A_ROW = 2
GENERAL_LOSS = 0.01
"""Share of a general suite's cases by which lost may exceed gained."""
PATIENCE = 3
"""Harmed evaluations in a row, with a drift that does not fall, after which a run steps back."""


@dataclass(frozen=True, kw_only=True)
class SpecCount:
    """One spec's line in a table. ``general`` counts pairs with the base."""

    spec: str
    kind: str
    cases: int
    passed: int
    base_passed: int
    lost: int
    gained: int
    green: bool


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What one evaluation is worth."""

    specs: tuple[SpecCount, ...]
    drift: float
    reasons: tuple[str, ...]
    """Why it is not green; empty when it is."""
    harmed: tuple[str, ...]
    """What the base had and the candidate lost: reasons to step back when they persist."""
    collapsed: tuple[str, ...]
    """Reasons to step back at once."""

    @property
    def green(self) -> bool:
        return not self.reasons


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact McNemar p-value of ``lost`` against ``gained`` discordant pairs (1.0 when there are none)."""
    n = lost + gained
    tail = sum(comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << n))


def paired_ok(cases: int, lost: int, gained: int) -> bool:
    """Whether a general suite counts as unharmed (see the module docstring)."""
    return lost - gained <= max(1.0, GENERAL_LOSS * cases) and not (lost > gained and mcnemar(lost, gained) < 0.05)


def lost_cases(outcomes: tuple[Outcome, ...]) -> str:
    """Up to three lost prompts, for a message."""
    prompts = [repr(o.case.prompt) for o in outcomes if o.lost]
    return ", ".join(prompts[:3]) + (f" and {len(prompts) - 3} more" if len(prompts) > 3 else "")


def assess(evaluation: Evaluation, *, drift_bound: float = DRIFT_BOUND) -> Assessment:
    """Judge one evaluation (see the module docstring)."""
    specs: list[SpecCount] = []
    reasons: list[str] = []
    harmed: list[str] = []
    for name in dict.fromkeys(o.case.spec for o in evaluation.outcomes):
        outcomes = evaluation.of(spec=name)
        kind = outcomes[0].case.kind
        lost, gained = sum(o.lost for o in outcomes), sum(o.gained for o in outcomes)
        failed = [o for o in outcomes if not o.passed]
        if kind == "general":
            green = paired_ok(len(outcomes), lost, gained)
            problem = f"{name}: {lost} lost against {gained} gained ({lost_cases(outcomes)})"
        elif kind == "preserve":
            green = lost == 0
            problem = f"{name}: {lost} lost ({lost_cases(outcomes)})"
        else:
            green = not failed
            first = failed[0] if failed else None
            detail = f"{first.case.prompt!r} -> {first.reply.text!r} {first.failures[0]}" if first else ""
            problem = f"{name}: {len(failed)} of {len(outcomes)} fail, e.g. {detail}"
        if not green:
            reasons.append(problem)
            if kind in ("general", "preserve"):
                harmed.append(problem)
        specs.append(
            SpecCount(
                spec=name,
                kind=kind,
                cases=len(outcomes),
                passed=sum(o.passed for o in outcomes),
                base_passed=sum(o.base_passed for o in outcomes),
                lost=lost,
                gained=gained,
                green=green,
            )
        )
    if hijacked := [o for o in evaluation.outcomes if o.hijacked and o.case.kind in ("preserve", "general")]:
        first = hijacked[0]
        reasons.append(
            f"{len(hijacked)} preserve or general replies are the target's, e.g. "
            f"{first.case.prompt!r} -> {first.reply.text!r}"
        )
    drift = evaluation.drift
    if not drift <= drift_bound:
        reasons.append(f"drift {drift:.3f} nats a token is above {drift_bound:g}")
        harmed.append(reasons[-1])
    return Assessment(
        specs=tuple(specs),
        drift=drift,
        reasons=tuple(reasons),
        harmed=tuple(harmed),
        collapsed=tuple(_collapse(evaluation)),
    )


def _collapse(evaluation: Evaluation) -> list[str]:
    found: list[str] = []
    if not evaluation.drift <= COLLAPSE_BOUND:
        found.append(f"drift {evaluation.drift:.3f} nats a token is above {COLLAPSE_BOUND:g}")
    if evaluation.looping > 0.5:
        found.append(f"{evaluation.looping:.0%} of the replies loop where the base's do not")
    replies = [o.reply.text for o in evaluation.outcomes if o.case.kind in ("preserve", "general")]
    before = {o.base_reply.text for o in evaluation.outcomes if o.case.kind in ("preserve", "general")}
    if len(replies) >= 8 and len(set(replies)) * 4 <= len(before):
        found.append(
            f"only {len(set(replies))} different replies to {len(replies)} unrelated prompts (base: {len(before)})"
        )
    return found


Decision = Literal["go-on", "green", "step-back"]


@dataclass(kw_only=True)
class History:
    """Evaluations over time."""

    greens: int = 0
    harmed: int = 0
    drift: float = float("inf")
    """Of the evaluation before."""
    reasons: tuple[str, ...] = field(default=())
    """Why the last decision was to step back."""

    def decide(self, assessment: Assessment) -> Decision:
        """Green after two green evaluations in a row; step back on collapse, or on harm that lasts and grows.

        The first steps of a run drift most and the later ones come back, so harm counts once it has lasted ``PATIENCE``
        evaluations and the drift is not falling.
        """
        self.greens = self.greens + 1 if assessment.green else 0
        self.harmed = self.harmed + 1 if assessment.harmed else 0
        grows, self.drift = assessment.drift >= self.drift, assessment.drift
        if assessment.collapsed or (self.harmed >= PATIENCE and grows):
            self.reasons = assessment.collapsed or assessment.harmed
            self.greens = self.harmed = 0
            self.drift = float("inf")
            return "step-back"
        return "green" if self.greens >= GREENS_IN_A_ROW else "go-on"
