"""The SVG: deterministic, complete, readable on any page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from alignment import curves
from alignment.record import EvalRecord, StepRecord


def step(number: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=number, loss=loss, target=loss / 2, contrast=loss / 3, replay=0.1, gradient_norm=1.0, lr=1e-4, seconds=1.0
    )


def evaluation(
    number: int, drift: float = 0.02, decision: str = "go-on", passed: tuple[int, int] = (3, 4)
) -> EvalRecord:
    return EvalRecord(
        step=number, drift=drift, green=False, decision=decision, passed={"a": passed}, reasons=(), seconds=1.0
    )


STEPS = [step(i, 3 / i) for i in range(1, 11)]
EVALS = [evaluation(5, decision="step-back"), evaluation(8), evaluation(10, decision="green", passed=(4, 4))]


def texts(data: bytes) -> list[str]:
    return [element.text or "" for element in ET.fromstring(data).iter("{http://www.w3.org/2000/svg}text")]


def test_every_line_and_mark_is_named() -> None:
    shown = texts(curves.svg(STEPS, EVALS, drift_bound=0.1))
    for label in ("loss", "target", "contrast", "replay", "drift", "bound 0.1", "cases in order"):
        assert label in shown
    for label in ("evaluation", "green", "step back"):
        assert shown.count(label) == 2
    for label in ("loss (nats/token)", "drift (nats/token)", "cases in order (%)", "step"):
        assert label in shown


def test_panels_without_data_are_left_out() -> None:
    assert "drift" not in texts(curves.svg(STEPS, []))
    assert "loss" not in texts(curves.svg([], EVALS))
    assert texts(curves.svg([], [])) == ["no step was taken and nothing was evaluated"]


@pytest.mark.parametrize(("steps", "evals"), [(STEPS, EVALS), ([], [])])
def test_the_same_numbers_give_the_same_bytes_under_any_settings(
    steps: list[StepRecord], evals: list[EvalRecord]
) -> None:
    before = dict(matplotlib.rcParams)
    first = curves.svg(steps, evals, drift_bound=0.1)
    assert dict(matplotlib.rcParams) == before  # nothing leaks out
    with matplotlib.rc_context(
        {"font.size": 30, "axes.facecolor": "black", "svg.hashsalt": "x", "svg.fonttype": "path"}
    ):
        assert curves.svg(steps, evals, drift_bound=0.1) == first  # and nothing in
    assert b"<dc:date>" not in first
    assert b"\r" not in first
    assert not any(line.endswith(b" ") for line in first.splitlines())


def test_readable_on_light_and_dark_pages() -> None:
    text = curves.svg(STEPS, EVALS, drift_bound=0.1).decode()
    colours = {colour.lower() for colour in re.findall(r"#[0-9a-fA-F]{6}\b", text)}
    assert colours == {curves.GREY, curves.BLUE, curves.VERMILION, curves.GREEN, curves.PURPLE}
    for element in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text"):
        assert f"fill: {curves.GREY}" in element.get("style", "")  # SVG's own default is black
    for colour in colours:
        for page in ("#ffffff", "#0d1117"):
            assert contrast(colour, page) >= 2.7, (colour, page)


def contrast(one: str, two: str) -> float:
    """WCAG contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_values_that_cannot_be_drawn_do_no_harm(bad: float) -> None:
    data = curves.svg([step(1), step(2, bad), step(3)], [evaluation(2, bad), evaluation(3)], drift_bound=bad)
    assert "loss" in texts(data)
    ET.fromstring(curves.svg([step(1, bad)], [evaluation(1, bad, passed=(0, 0))], drift_bound=bad))


def test_one_step_is_visible() -> None:
    root = ET.fromstring(curves.svg([step(1)], []))
    marks = [element.get("style", "") for element in root.iter("{http://www.w3.org/2000/svg}use")]
    for colour in (curves.VERMILION, curves.GREEN, curves.PURPLE):
        assert any(f"fill: {colour}" in style for style in marks)


def test_in_words() -> None:
    assert curves.alt([], []) == "Curves over steps"
    assert curves.alt(STEPS, EVALS) == (
        "Curves over steps; loss from 3.000 to 0.300 over 10 steps; "
        "at the last evaluation drift 0.0200 nats a token, 4 of 4 cases in order"
    )


def test_share() -> None:
    assert curves.share(evaluation(1)) == 0.75
    assert curves.share(evaluation(1, passed=(0, 0))) == 1.0
