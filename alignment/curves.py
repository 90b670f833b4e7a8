"""The curves of a run as one SVG: loss and its parts, drift, cases in order.

    data = curves.svg(record.steps, record.evals)

Promises: the same numbers give the same bytes, whatever the user's matplotlib settings; no window and no figure that
outlives the call. Text stays text, in a mid-grey that reads on a light and on a dark page; every line differs from the
others in dash as well as in a colour-blind safe hue. Values that are not finite leave a gap.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignment.record import EvalRecord, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY = "#7c7c7c"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
_MARKS = {
    "go-on": ("o", BLUE, "evaluation"),
    "green": ("*", GREEN, "green"),
    "step-back": ("X", VERMILION, "step back"),
}


def svg(steps: Sequence[StepRecord], evals: Sequence[EvalRecord], *, drift_bound: float | None = None) -> bytes:
    """The picture, UTF-8. Panels without data are left out; with no data at all it says so."""
    # Imported here: matplotlib takes half a second that no other command should wait for.
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings = {
        "svg.hashsalt": "align",  # element ids are random without it
        "svg.fonttype": "none",
        "axes.unicode_minus": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    }
    panels = [panel for panel, data in ((_loss, steps), (_drift, evals), (_cases, evals)) if data]
    with style.context(["default", settings]):
        figure = Figure(figsize=(8, 2.3 * len(panels) + 0.4 if panels else 1), layout="constrained")
        if not panels:
            figure.text(0.5, 0.5, "no step was taken and nothing was evaluated", ha="center", va="center")
        axes: list[Axes] = []
        if panels:
            axes = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
        for panel, axis in zip(panels, axes, strict=True):
            panel(axis, steps, evals, drift_bound)
            axis.grid(color=GREY, alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        if panels:
            axes[-1].set_xlabel("step")
        out = io.BytesIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": "Curves of the run"}
        )
    # One line end and no trailing blanks, so that a report kept in git shows no noise.
    return b"\n".join(line.rstrip() for line in out.getvalue().splitlines()) + b"\n"


def _loss(axis: Axes, steps: Sequence[StepRecord], evals: Sequence[EvalRecord], bound: float | None) -> None:
    x = [s.step for s in steps]
    marker = "." if len(steps) == 1 else ""  # a line of one point is invisible
    axis.plot(x, [s.loss for s in steps], color=GREY, linewidth=2.2, marker=marker, label="loss")
    for name, colour, dash in (("target", VERMILION, "--"), ("contrast", GREEN, "-."), ("replay", PURPLE, ":")):
        y = [getattr(s, name) for s in steps]
        axis.plot(x, y, color=colour, linestyle=dash, marker=marker, linewidth=1.6, label=name)
    for e in evals:
        axis.axvline(e.step, color=GREY, alpha=0.35, linewidth=0.6)
    axis.set_ylabel("loss (nats/token)")


def _drift(axis: Axes, steps: Sequence[StepRecord], evals: Sequence[EvalRecord], bound: float | None) -> None:
    axis.plot([e.step for e in evals], [e.drift for e in evals], color=BLUE, linewidth=1.6, label="drift")
    _marks(axis, evals, [e.drift for e in evals])
    if bound is not None:
        axis.axhline(bound, color=VERMILION, linestyle="--", linewidth=1.2, label=f"bound {bound:g}")
    axis.set_ylabel("drift (nats/token)")


def _cases(axis: Axes, steps: Sequence[StepRecord], evals: Sequence[EvalRecord], bound: float | None) -> None:
    x, y = [e.step for e in evals], [share(e) * 100 for e in evals]
    axis.plot(x, y, color=GREEN, linewidth=1.6, label="cases in order")
    _marks(axis, evals, y)
    axis.set_ylabel("cases in order (%)")


def _marks(axis: Axes, evals: Sequence[EvalRecord], values: Sequence[float]) -> None:
    for decision, (marker, colour, label) in _MARKS.items():
        points = [(e.step, y) for e, y in zip(evals, values, strict=True) if e.decision == decision]
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=colour, markersize=7, label=label)


def alt(steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> str:
    """The picture in words, for those who do not see it."""
    parts = ["Curves over steps"]
    if steps:
        parts.append(f"loss from {steps[0].loss:.3f} to {steps[-1].loss:.3f} over {len(steps)} steps")
    if evals:
        good, cases = (sum(pair[i] for pair in evals[-1].passed.values()) for i in (0, 1))
        parts.append(
            f"at the last evaluation drift {evals[-1].drift:.4f} nats a token, {good} of {cases} cases in order"
        )
    return "; ".join(parts)


def share(evaluation: EvalRecord) -> float:
    """Cases in order of all cases, 0 to 1 (1 when there are none)."""
    cases = sum(total for _, total in evaluation.passed.values())
    return sum(good for good, _ in evaluation.passed.values()) / cases if cases else 1.0
