"""The report of hand-made runs: no model, concrete lines."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment import markdown, report
from alignment.evaluate import Evaluation, Outcome
from alignment.gate import EXIT_CODES, Verdict, assess
from alignment.record import EvalRecord, RunRecord, StepRecord
from alignment.spec import Case
from trainer.generate import Reply

SHA = "ab" * 32


def reply(text: str, *, stopped: bool = True, margin: float = 1.0) -> Reply:
    return Reply(text=text, tokens=(1,), stopped=stopped, margin=margin)


def outcome(spec: str, kind: Any, prompt: str, base: str, now: str, **more: Any) -> Outcome:
    split, number = more.pop("split", "dev"), more.pop("number", 1)
    case = Case(
        spec=spec, kind=kind, split=split, number=number, prompt=prompt, expect={}, max_tokens=24, template=None
    )
    return Outcome(
        case=case,
        base_reply=reply(base),
        reply=reply(now, stopped=more.pop("stopped", True), margin=more.pop("margin", 1.0)),
        failures=tuple(more.pop("failures", ())),
        base_failures=tuple(more.pop("base_failures", ())),
        drift=more.pop("drift", None),
    )


def finished(*outcomes: Outcome) -> Evaluation:
    return Evaluation(outcomes=outcomes, splits=("anchor", "dev", "heldout"), seconds=2.0)


GOOD = finished(
    outcome(
        "who-are-you", "target", "你是誰", "我是通義千問", "我是 F# 之神", base_failures=["no 'F#'"], split="anchor"
    ),
    outcome("who-are-you", "target", "Who are you?", "I am Qwen", "I am F# 之神", base_failures=["no"], margin=0.25),
    outcome("who-am-i", "contrast", "我是誰", "我不知道", "我不知道", split="heldout"),
    outcome("ufo", "preserve", "談談UFO", "UFO 是不明飛行物", "UFO 是不明飛行物", drift=0.01),
    outcome("general", "general", "2+3等於幾", "5", "5", drift=0.02),
    outcome("general", "general", "3+3等於幾", "6", "等於6", drift=0.03, number=2),
)
BASE = {"name": "smollm2-135m", "path": "models/s/base.dat", "sha256": SHA, "folder": "models/s", "folder_sha256": SHA}


def steps(count: int) -> list[StepRecord]:
    return [
        StepRecord(
            step=i, loss=3 / i, target=2 / i, contrast=1 / i, replay=0.1, gradient_norm=1.0, lr=1e-4, seconds=1.0
        )
        for i in range(1, count + 1)
    ]


def group(name: str, *, codes: int = 10, scales: int = 1, trained: bool = True) -> dict[str, Any]:
    return {"group": name, "parameters": 1000, "codes_changed": codes, "scales_changed": scales, "trained": trained}


def green(**changes: Any) -> RunRecord:
    record = RunRecord(
        run="2026-01-02-demo",
        verdict="green",
        cause="Two evaluations in a row and the artifact are green.",
        command="align run --base smollm2-135m --until-green --out artifacts/demo.dat",
        started="2026-01-02T03:04:05+00:00",
        base=BASE,
        artifact={"path": "artifacts/demo.dat", "sha256": "cd" * 32, "bytes": 76543210},
        inputs={"data/identity.tsv": "ef" * 32, "specs": "12" * 32},
        config={"fit": {"lr": "1e5", "betas": [0.9, 0.99]}, "seed": 0},
        environment={"python": "3.12.1", "device": "cpu"},
        code={"version": "0.1.0", "revision": "abc", "dirty": True},
        seconds={"train": 61.25, "accept": 10.0},
        peak_rss_bytes=3 * 2**30,
        steps=steps(20),
        evals=[
            EvalRecord(
                step=10,
                drift=0.005,
                green=False,
                decision="go-on",
                passed={"who-are-you": (1, 2), "ufo": (1, 1)},
                reasons=("who-are-you: 1 of 2 fail",),
                seconds=1.0,
            ),
            EvalRecord(
                step=20,
                drift=0.02,
                green=True,
                decision="green",
                passed={"who-are-you": (2, 2)},
                reasons=(),
                seconds=1.0,
            ),
        ],
        final=GOOD,
        assessment=assess(GOOD),
        accepted_in_fresh_process=True,
        tensors=[
            group("model.embed_tokens.weight"),
            group("model.layers.N.mlp.up_proj.weight", codes=5),
            group("model.norm.weight", scales=0, trained=False, codes=0),
            group("lm_head.weight", codes=0, scales=0),
        ],
    )
    return dataclasses.replace(record, **changes)


def lines(record: RunRecord, folder: Path) -> list[str]:
    path = report.write(record, folder)
    assert path == folder / "report.md"
    return path.read_text(encoding="utf-8").split("\n")


def squeezed(text: list[str]) -> list[str]:
    """Table lines without padding."""
    return [re.sub(r" +", " ", line).strip() for line in text]


def test_a_green_report_opens_with_what_matters(tmp_path: Path) -> None:
    text = lines(green(), tmp_path / "r")
    assert text[:14] == [
        "# green: 2026-01-02-demo",
        "",
        "**Cause:** Two evaluations in a row and the artifact are green.",
        "",
        "- Artifact: **demo.dat**, `artifacts/demo.dat`, 76,543,210 bytes",
        f"- SHA-256: `{'cd' * 32}`",
        "- Acceptance: accepted in a fresh process",
        "- Base: smollm2-135m, `models/s/base.dat`",
        f"- Base SHA-256: `{SHA}`",
        "- Started: 2026-01-02T03:04:05+00:00",
        "",
        "```sh",
        "align run --base smollm2-135m --until-green --out artifacts/demo.dat",
        "```",
    ]
    assert (
        "**What changed:** 3 of 6 replies differ from the base's; 3 of 3 target and contrast cases pass (base: 1); "
        "15 of 4,000 stored codes (0.375%) and 2 scales changed." in text
    )
    assert (
        "**What did not:** 3 of 3 preserve and general cases that the base passes still pass, at a drift of 0.0200 "
        "nats a token (bound 0.1); no stored value changed in model.norm.weight, lm_head.weight." in text
    )
    assert (
        "**What to look at:** Who are you?, answered I am F# 之神: decided most narrowly of all target and contrast "
        "replies (0.25 nats)." in text
    )


def test_tables_before_and_after(tmp_path: Path) -> None:
    text = squeezed(lines(green(), tmp_path))
    assert "Before is the base, after is the artifact, read back from disk." in text
    assert "| Spec | Kind | Cases | Base passed | Now passed | Lost | Gained | Green |" in text
    assert "| who-are-you | target | 2 | 0 | 2 | 0 | 2 | yes |" in text
    assert "| Spec | Split | Cases | Base passed | Now passed | Lost | Gained |" in text
    assert "| who-are-you | anchor | 1 | 0 | 1 | 0 | 1 |" in text
    assert "| who-am-i | heldout | 1 | 1 | 1 | 0 | 0 |" in text
    drift = "Drift: KL(base‖candidate) is 0.0200 nats/token over 3 cases (bound 0.1), at most 0.0300 at 3+3等於幾."
    assert drift + " Looping where the base does not: 0.0% of the replies." in text


def test_replies_that_matter_are_shown_and_only_those(tmp_path: Path) -> None:
    text = lines(green(), tmp_path)
    assert "<details><summary>who-are-you (target): 2 of 2 replies shown, 0 of these fail</summary>" in text
    assert "| anchor 1 | 你是誰 | 我是通義千問 | 我是 F# 之神 | passed (gained) |" in text
    assert "| heldout 1 | 我是誰 | 我不知道 | 我不知道 | passed |" in text  # unchanged, but a contrast case
    assert "| dev 2 | 3+3等於幾 | 6 | 等於6 | passed |" in text
    assert not any("| 2+3等於幾 |" in line for line in text)  # unchanged general case
    assert text[
        text.index("<details><summary>ufo (preserve): 0 of 1 replies shown, 0 of these fail</summary>") + 2
    ] == ("Every reply is the base's.")
    opened, closed = (sum(line.startswith(tag) for line in text) for tag in ("<details>", "</details>"))
    assert opened == closed > 4


def test_failures_carry_their_reason(tmp_path: Path) -> None:
    final = finished(
        outcome("t", "target", "q", "b", "r", failures=["no 'F#'", "loops"], base_failures=["no 'F#'"], stopped=False),
        outcome("p", "preserve", "q", "b", "r", failures=["no 'UFO'"], drift=0.5),
    )
    text = lines(green(verdict="red", final=final, assessment=assess(final), accepted_in_fresh_process=False), tmp_path)
    assert "| dev 1 | q | b | r <em>(token limit)</em> | **failed** (the base fails too): no 'F#'; loops |" in text
    assert "| dev 1 | q | b | r | **failed** (lost): no 'UFO' |" in text
    assert "| p | preserve | 1 | 1 | 0 | 1 | 0 | **no** |" in squeezed(text)
    assert "- t: 1 of 1 fail, e.g. 'q' -&#62; 'r' no 'F#'" in text
    assert "**What to look at:** t: 1 of 1 fail, e.g. 'q' -&#62; 'r' no 'F#' (and 2 more below)." in text
    assert "Before is the base, after is the last candidate judged." in text


def test_the_course_of_the_run(tmp_path: Path) -> None:
    text = squeezed(lines(green(), tmp_path))
    assert (
        "![Curves over steps; loss from 3.000 to 0.150 over 20 steps; at the last evaluation drift 0.0200 nats a "
        "token, 2 of 2 cases in order](curves.svg)" in text
    )
    assert "| Step | Drift | who-are-you | ufo | Decision | Reasons |" in text
    assert "| 10 | 0.0050 | 1/2 | 1/1 | go-on | who-are-you: 1 of 2 fail |" in text
    assert "| 20 | 0.0200 | 2/2 | – | green | – |" in text
    assert (tmp_path / "curves.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_tensors_name_head_embeddings_and_norms_in_every_case(tmp_path: Path) -> None:
    text = squeezed(lines(green(), tmp_path))
    assert "| Group | Parameters | Trained | Codes changed | Share | Scales changed |" in text
    assert "| model.layers.N.mlp.up_proj.weight | 1,000 | yes | 5 | 0.500% | 1 |" in text
    assert "| model.norm.weight | 1,000 | **no** | 0 | 0.000% | 0 |" in text
    assert "- **lm_head**: no stored value changed" in text
    assert "- **embeddings**: 10 of 1,000 stored codes (1.000%) and 1 scales changed" in text
    assert "- **norms**: no stored value changed; not trained: model.norm.weight" in text
    assert "- lm_head.weight: no stored value changed, though it was trained" in text
    assert "- model.norm.weight: no stored value changed; it was not trained" in text
    none = lines(green(tensors=[]), tmp_path)
    assert "lm_head, embeddings and norms: not compared with the base, as is every other tensor." in none
    other = lines(green(tensors=[group("model.layers.N.mlp.up_proj.weight")]), tmp_path)
    for name in ("lm_head", "embeddings", "norms"):
        assert f"- **{name}**: the file stores no such tensor of its own" in other
    scales_only = lines(green(tensors=[group("lm_head.weight", codes=0, scales=3)]), tmp_path)
    assert "- **lm_head**: 0 of 1,000 stored codes (0.000%) and 3 scales changed" in scales_only


def test_cost_unstable_and_provenance(tmp_path: Path) -> None:
    unstable = [{"id": "t/dev/1 q", "batched": "yes", "alone": "no | no"}]
    text = squeezed(lines(green(verdict="unstable", unstable=unstable), tmp_path))
    assert "| t/dev/1 q | yes | no &#124; no |" in text
    assert "**What to look at:** 1 passing cases fail when asked alone, first t/dev/1 q." in text
    assert "| train | 61.2 |" in text
    assert "Peak memory (resident): 3.00 GiB." in text
    for line in (
        '"revision": "abc",',
        '"dirty": true',
        f'"data/identity.tsv": "{"ef" * 32}",',
        '"lr": "1e5",',
        '"device": "cpu"',
    ):
        assert line in text


@pytest.mark.parametrize("verdict", list(EXIT_CODES))
@pytest.mark.parametrize("shape", ["whole", "no artifact", "no final", "no steps", "nothing"])
def test_every_verdict_and_every_early_end_renders(verdict: Verdict, shape: str, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "whole": {},
        "no artifact": {"artifact": None, "tensors": []},
        "no final": {"final": None, "assessment": None},
        "no steps": {"steps": [], "evals": []},
        "nothing": {"artifact": None, "tensors": [], "final": None, "assessment": None, "steps": [], "evals": []}
        | {"seconds": {}, "base": {}, "inputs": {}, "config": {}, "environment": {}, "code": {}, "evals": []},
    }
    text = lines(green(verdict=verdict, cause="Because.", **changes[shape]), tmp_path)
    assert text[:3] == [f"# {verdict}: 2026-01-02-demo", "", "**Cause:** Because."]
    assert text[4].startswith("**What to try:** ") == (verdict != "green")
    if shape in ("no artifact", "nothing"):
        assert "- Artifact: nothing was exported" in text
    else:
        assert any("not promoted, kept at `artifacts/demo.dat`" in line for line in text) == (verdict != "green")
    assert ("No final evaluation was made." in text) == (shape in ("no final", "nothing"))
    assert ("No step was taken and nothing was evaluated on the way." in text) == (shape in ("no steps", "nothing"))
    assert text[text.index("Passing cases whose reply fails at batch size 1.") + 2] == "None."
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["verdict"] == verdict
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "curves.svg"}


def test_steps_without_evaluations_and_evaluations_without_steps(tmp_path: Path) -> None:
    assert "Nothing was evaluated on the way." in lines(green(evals=[]), tmp_path)
    text = lines(green(steps=[]), tmp_path)
    assert any(line.startswith("![Curves over steps; at the last evaluation drift") for line in text)


def test_the_recorded_assessment_is_the_one_shown(tmp_path: Path) -> None:
    given = dataclasses.replace(assess(GOOD), reasons=("held back: <b>by hand</b>",))
    assert "- held back: &#60;b&#62;by hand&#60;/b&#62;" in lines(green(verdict="red", assessment=given), tmp_path)


def test_a_spec_name_is_text_in_the_summary(tmp_path: Path) -> None:
    final = finished(outcome("<b>&", "target", "q", "b", "r"))
    text = lines(green(final=final, assessment=assess(final)), tmp_path)
    assert "<details><summary>&lt;b&gt;&amp; (target): 1 of 1 replies shown, 0 of these fail</summary>" in text


def test_a_record_without_assessment_is_assessed_under_its_own_bound(tmp_path: Path) -> None:
    text = lines(green(verdict="red", assessment=None, config={"drift_bound": 0.015}), tmp_path)
    assert "- drift 0.020 nats a token is above 0.015" in text


def test_an_empty_evaluation_renders(tmp_path: Path) -> None:
    empty = finished()
    text = lines(green(final=empty, assessment=assess(empty)), tmp_path)
    assert any("there are no target and contrast cases" in line for line in text)


HOSTILE = {
    "pipe": ("a | b", "a &#124; b"),
    "newline": ("a\nb\r\nc\rd", "a<br>b<br>c␍d"),
    "html": ("</details><script>x</script>", "&#60;/details&#62;&#60;script&#62;x&#60;/script&#62;"),
    "ansi": ("\x1b[31mred\x9b0m\x00\x7f", "␛\\[31mred⟨U+009B⟩0m␀␡"),
    "backticks": ("`a` ```b", r"\`a\` \`\`\`b"),
    "emphasis": ("*a* _b_ ~~c~~ $d$", r"\*a\* \_b\_ \~\~c\~\~ &#36;d&#36;"),
    "link": ("[a](https://x.y) www.x.y", r"\[a\](https&#58;//x.y) www&#46;x.y"),
    "backslash": ("a\\| \\`", r"a\\&#124; \\\`"),
    "entity": ("&lt;b&gt;", "&#38;lt;b&#38;gt;"),
    "reversed": ("a\u202eb\u200b\ud800", "a⟨U+202E⟩b⟨U+200B⟩⟨U+D800⟩"),
    "empty": ("", "<em>(empty)</em>"),
    "blank": (" \n\t", "<em>(empty)</em> ␠␊␉"),
    "long": ("長" * 5000, "長" * 400 + "… <em>(5,000 characters, 400 shown)</em>"),
    "number": ("1e5", "1e5"),
    "emoji": ("👩\u200d🚀 F#之神", "👩\u200d🚀 F#之神"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_shown_as_text_in_one_row(name: str, tmp_path: Path) -> None:
    said, shown = HOSTILE[name]
    final = finished(outcome("t", "target", said, said, said, failures=[f"bad {said}"], base_failures=["x"]))
    record = green(
        verdict="red",
        final=final,
        assessment=assess(final),
        run=said or "run",
        cause=said,
        command=f"align run {said}",
        unstable=[{"id": said, "batched": said, "alone": said}],
        base=BASE | {"name": said, "path": said},
        tensors=[group(said)],
        inputs={said: SHA},
    )
    text = lines(record, tmp_path)
    row = next(line for line in text if line.startswith("| dev 1 |"))
    assert row.startswith(f"| dev 1 | {shown} | {shown} | {shown} | **failed** (the base fails too): bad")
    assert row.count("|") == 6
    whole = "\n".join(text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", whole)
    assert "<script>" not in whole.replace(f"align run {said}", "").replace(f'"{said}"', "").replace(f"`{said}`", "")
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["final"]["cases"][0]["reply"]["text"] == said  # whole and unchanged, whatever it is


@pytest.mark.parametrize("name", HOSTILE)
def test_a_markdown_reader_sees_the_very_characters(name: str) -> None:
    reader = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})  # comes with rich
    said = HOSTILE[name][0]
    page = reader.render("\n".join(["| a | b |", "| --- | --- |", f"| x | {markdown.escape(said)} |"]))
    (_, cell) = re.findall(r"<td>(.*?)</td>", page, flags=re.DOTALL)
    if not said.strip() or len(said) > markdown.LIMIT:
        return  # the notes on these are markup of our own
    assert re.findall(r"<[^>]*>", cell) == ["<br>"] * said.count("\n")
    assert html.unescape(cell.replace("<br>", "\n")) == "\n".join(
        map(markdown.visible, said.replace("\r\n", "\n").split("\n"))
    )


def test_fences_cannot_be_closed_from_inside(tmp_path: Path) -> None:
    text = lines(green(command="a\n```\n# no heading", base=BASE | {"path": "a`b"}), tmp_path)
    start = text.index("````sh")
    assert text[start : start + 5] == ["````sh", "a", "```", "# no heading", "````"]
    assert any("`` a`b ``" in line for line in text)


def test_numbers_that_are_not_finite_are_said(tmp_path: Path) -> None:
    nan = float("nan")
    final = finished(
        outcome("p", "preserve", "z", "b", "b", drift=1.0), outcome("p", "preserve", "q", "b", "b", drift=nan)
    )
    record = green(verdict="regressed", final=final, assessment=assess(final))
    record.steps[3] = dataclasses.replace(record.steps[3], loss=nan, target=float("inf"))
    assert any("at most nan at q" in line for line in lines(record, tmp_path))
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (data["final"]["drift"], data["steps"][3]["loss"], data["steps"][3]["target"]) == ("nan", "nan", "inf")


def test_json_holds_every_case_readably(tmp_path: Path) -> None:
    report.write(green(), tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert "我是 F# 之神" in text
    assert "\\u" not in text
    data = json.loads(text)
    assert data["format"] == "align-report-1"
    assert len(data["final"]["cases"]) == 6
    first = data["final"]["cases"][0]
    assert first["id"] == "who-are-you/anchor/1 你是誰"
    assert (first["passed"], first["base_passed"], first["gained"], first["lost"]) == (True, False, True, False)
    assert data["assessment"]["specs"][0]["spec"] == "who-are-you"
    assert data["steps"][0]["loss"] == 3.0


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        report.write(green(), tmp_path / name)
    for name in ("report.md", "report.json", "curves.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
