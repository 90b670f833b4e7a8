"""The report of a run: ``report.md`` for a person, ``report.json`` for a program, ``curves.svg`` for both.

    path = report.write(record, Path("reports/2026-01-01-demo"))

Promises: every field of the record is in it, whatever the verdict and however early the run ended; what a model said is
shown as text, never as Markdown, HTML or terminal commands; the same record gives the same bytes. ``report.md`` is
written last: where it is, the other two are. Does not judge: green, lost and passed are the record's and the gate's.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from alignment import curves
from alignment.evaluate import Evaluation, Outcome
from alignment.gate import DRIFT_BOUND, Assessment, Verdict, assess
from alignment.manifest import json_bytes
from alignment.record import RunRecord
from trainer.files import atomic_write

LIMIT = 400
"""Characters of a reply that are shown; report.json has all of them."""
REASONS = 4000
"""The same for the reasons of an evaluation and for values of the configuration."""
TO_TRY: dict[Verdict, str] = {
    "green": "",
    "red": "read the failing cases below; add training rows that resemble them, or give the run more steps.",
    "regressed": "see below what was lost; lower the learning rate, or add replay and contrast rows like it.",
    "unstable": "read the unstable cases below; train on until those replies are decided by a wider margin.",
    "guarded": "free memory, raise the guard's limit or make the batches smaller, then go on with `--resume`.",
}


def write(record: RunRecord, folder: Path) -> Path:
    """Write the three files into ``folder`` (made when missing) and return the path of report.md. Raises OSError."""
    bound = record.config.get("drift_bound", DRIFT_BOUND)
    bound = float(bound) if isinstance(bound, (int, float)) else DRIFT_BOUND
    assessment = record.assessment or (assess(record.final, drift_bound=bound) if record.final else None)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "curves.svg": curves.svg(record.steps, record.evals, drift_bound=bound),
        "report.json": json_bytes(_data(record, assessment)),
        "report.md": "\n".join(_lines(record, assessment, bound)).encode(),
    }
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return folder / "report.md"


def _data(record: RunRecord, assessment: Assessment | None) -> dict[str, Any]:
    data = {"format": "align-report-1", **record.plain(), "assessment": None, "final": None}
    if assessment:
        data["assessment"] = vars(assessment) | {
            "green": assessment.green,
            "specs": [vars(s) for s in assessment.specs],
        }
    if record.final:
        cases = [
            {"id": o.case.id, "spec": o.case.spec, "kind": o.case.kind, "split": o.case.split, "prompt": o.case.prompt}
            | {"base_reply": o.base_reply.text, "reply": o.reply.text, "passed": o.passed, "base_passed": o.base_passed}
            | {"failures": o.failures, "base_failures": o.base_failures, "changed": o.changed, "drift": o.drift}
            | {"stopped": o.reply.stopped, "margin": o.reply.margin}
            for o in record.final.outcomes
        ]
        data["final"] = {"splits": record.final.splits, "seconds": record.final.seconds, "cases": cases}
    return data


def _lines(record: RunRecord, assessment: Assessment | None, bound: float) -> list[str]:
    lines = [f"# {record.verdict}: {escape(record.run)}", "", f"**Cause:** {escape(record.cause, REASONS)}", ""]
    if TO_TRY[record.verdict]:
        lines += [f"**What to try:** {TO_TRY[record.verdict]}", ""]
    lines += [*_artifact(record), f"- Base: {escape(record.base.get('name'))}, {code(record.base.get('path'))}"]
    lines += [f"- Base SHA-256: {code(record.base.get('sha256'))}", f"- Started: {escape(record.started)}", ""]
    lines += [*_fenced(record.command), *_sentences(record, assessment, bound)]
    lines += ["## Specs, before and after", "", *_specs(record, assessment, bound)]
    lines += ["## Replies", "", *_replies(record.final)]
    lines += ["## Course of the run", "", *_course(record)]
    lines += ["## Which tensors changed", "", *_tensors(record.tensors)]
    lines += ["## Unstable cases", "", *_unstable(record)]
    lines += ["## Time and memory", "", *_cost(record)]
    lines += ["## Provenance", "", *_provenance(record)]
    return lines


def _artifact(record: RunRecord) -> list[str]:
    if record.artifact is None:
        return ["- Artifact: nothing was exported"]
    path, size = Path(str(record.artifact["path"])), int(record.artifact["bytes"])
    place = f"**{escape(path.name)}**, {code(path)}"
    if record.verdict != "green":
        place = f"**{escape(path.name)}**, not promoted, kept at {code(path)}"
    lines = [f"- Artifact: {place}, {size:,} bytes", f"- SHA-256: {code(record.artifact['sha256'])}"]
    proof = "read back from disk and judged in a fresh process" if record.accepted_in_fresh_process else "not made"
    return [*lines, f"- Acceptance: {proof}"]


def _sentences(record: RunRecord, assessment: Assessment | None, bound: float) -> list[str]:
    final, tensors = record.final, record.tensors
    changed, kept = [], []
    look = "the cause above and the last evaluations below: no final evaluation was made."
    if final and assessment:
        own = [*final.of(kind="target"), *final.of(kind="contrast")]
        changed.append(
            f"{sum(o.changed for o in final.outcomes)} of {len(final.outcomes)} replies differ from the base's; "
            f"{sum(o.passed for o in own)} of {len(own)} target and contrast cases pass "
            f"(base: {sum(o.base_passed for o in own)})"
        )
        had = [o for o in (*final.of(kind="preserve"), *final.of(kind="general")) if o.base_passed]
        kept.append(
            f"{sum(o.passed for o in had)} of {len(had)} preserve and general cases that the base passes still pass, "
            f"at a drift of {final.drift:.4f} nats a token (bound {bound:g})"
        )
        look = _look(record, assessment, had, own)
    if tensors:
        codes, total = (sum(int(row[key]) for row in tensors) for key in ("codes_changed", "parameters"))
        still = [str(row["group"]) for row in tensors if not _moved(row)]
        changed.append(f"{codes:,} of {total:,} stored codes ({_percent(codes, total)})")
        kept.append(f"no stored value in {', '.join(map(escape, still))}" if still else "no tensor group is untouched")
    return [
        f"**What changed:** {'; '.join(changed) or 'nothing that was measured'}.",
        "",
        f"**What did not:** {'; '.join(kept) or 'nothing was measured; the base itself is never written to'}.",
        "",
        f"**What to look at:** {look}",
        "",
    ]


def _look(record: RunRecord, assessment: Assessment, had: Sequence[Outcome], own: Sequence[Outcome]) -> str:
    if assessment.reasons:
        more = len(assessment.reasons) - 1
        return escape(assessment.reasons[0]) + (f" (and {more} more below)" if more else "") + "."
    if record.unstable:
        return f"{len(record.unstable)} passing cases fail when asked alone, first {escape(record.unstable[0]['id'])}."
    if lost := [o for o in had if o.lost]:
        return (
            f"{len(lost)} lost within the tolerance, first {escape(lost[0].case.prompt)}: {escape(lost[0].reply.text)}"
        )
    if not own:
        return "there are no target and contrast cases: nothing new was asked of the model."
    near = min(own, key=lambda o: o.reply.margin)
    return (
        f"{escape(near.case.prompt)}, answered {escape(near.reply.text)}: of all target and contrast replies "
        f"it was decided most narrowly ({near.reply.margin:.2f} nats)."
    )


def _specs(record: RunRecord, assessment: Assessment | None, bound: float) -> list[str]:
    final = record.final
    if assessment is None:
        return ["No final evaluation was made.", ""]
    after = "the artifact" if record.accepted_in_fresh_process else "the candidate; no artifact was accepted"
    head = ["Cases", "Base passed", "Now passed", "Lost", "Gained"]
    rows = [
        [escape(s.spec), s.kind, s.cases, s.base_passed, s.passed, s.lost, s.gained, "yes" if s.green else "**no**"]
        for s in assessment.specs
    ]
    lines = [f"Before is the base, after is {after}.", "", *table(["Spec", "Kind", *head, "Green"], rows, "llrrrrrl")]
    if assessment.reasons:
        lines += ["Not green because:", "", *(f"- {escape(reason, REASONS)}" for reason in assessment.reasons), ""]
    if final is None:
        return [*lines, f"Drift: {assessment.drift:.4f} nats/token (bound {bound:g}).", ""]
    rows = []
    for spec, split in dict.fromkeys((o.case.spec, o.case.split) for o in final.outcomes):
        some = final.of(spec=spec, split=split)
        counts = [sum(getattr(o, name) for o in some) for name in ("base_passed", "passed", "lost", "gained")]
        rows.append([escape(spec), split, len(some), *counts])
    lines += ["By split:", "", *table(["Spec", "Split", *head], rows, "llrrrrr")]
    measured = [o for o in final.outcomes if o.drift is not None]
    text = f"Drift: KL(base‖candidate) is {final.drift:.4f} nats/token over {len(measured)} cases (bound {bound:g})"
    if measured:
        worst = max(measured, key=lambda o: o.drift or 0.0)
        text += f", at most {worst.drift:.4f} at {escape(worst.case.prompt)}"
    return [*lines, f"{text}. Looping where the base does not: {final.looping:.1%} of the replies.", ""]


def _replies(final: Evaluation | None) -> list[str]:
    if final is None:
        return ["No final evaluation was made.", ""]
    lines = ["Every target and contrast reply, and of the other specs every reply that differs from the base's.", ""]
    for spec in dict.fromkeys(o.case.spec for o in final.outcomes):
        outcomes = final.of(spec=spec)
        kind = outcomes[0].case.kind
        shown = [o for o in outcomes if kind in ("target", "contrast") or o.changed]
        failed = sum(not o.passed for o in shown)
        title = f"{visible(spec)} ({kind}): {len(shown)} of {len(outcomes)} replies shown, {failed} of these fail"
        lines += [f"<details><summary>{html.escape(title)}</summary>", ""]
        if shown:
            # No padding as tabulate does it: one long reply would widen every row.
            rows = [
                [
                    f"{o.case.split} {o.case.number}",
                    *map(escape, (o.case.prompt, o.base_reply.text)),
                    _reply(o),
                    _result(o),
                ]
                for o in shown
            ]
            head = [["Case", "Prompt", "Base reply", "Reply", "Result"], ["---"] * 5]
            lines += ["| " + " | ".join(row) + " |" for row in head + rows]
        else:
            lines.append("Every reply is the base's.")
        lines += ["", "</details>", ""]
    return lines


def _reply(outcome: Outcome) -> str:
    return escape(outcome.reply.text) + ("" if outcome.reply.stopped else " <em>(token limit)</em>")


def _result(outcome: Outcome) -> str:
    if outcome.passed:
        return "passed (gained)" if outcome.gained else "passed"
    against = "lost" if outcome.lost else "the base fails too"
    return f"**failed** ({against}): {escape('; '.join(outcome.failures))}"


def _course(record: RunRecord) -> list[str]:
    steps, evals = record.steps, record.evals
    if not (steps or evals):
        return ["No step was taken and nothing was evaluated on the way.", ""]
    alt = [f"loss from {steps[0].loss:.3f} to {steps[-1].loss:.3f} over {len(steps)} steps"] if steps else []
    if evals:
        good, cases = (sum(pair[i] for pair in evals[-1].passed.values()) for i in (0, 1))
        alt += [f"drift {evals[-1].drift:.4f} nats a token and {good} of {cases} cases in order at the last evaluation"]
    lines = [f"![Curves over steps: {'; '.join(alt)}](curves.svg)", ""]
    if not evals:
        return [*lines, "Nothing was evaluated on the way.", ""]
    names = list(dict.fromkeys(name for e in evals for name in e.passed))
    rows = []
    for e in evals:
        counts = ["/".join(map(str, e.passed.get(name, ("–",)))) for name in names]
        decision = e.decision + (" (green)" if e.green and e.decision != "green" else "")
        rows.append([e.step, f"{e.drift:.4f}", *counts, decision, escape("; ".join(e.reasons), REASONS)])
    head = ["Step", "Drift", *map(escape, names), "Decision", "Reasons"]
    body = table(head, rows, "rr" + "r" * len(names) + "ll")
    return [*lines, f"<details><summary>All {len(evals)} evaluations</summary>", "", *body, "</details>", ""]


def _moved(row: dict[str, Any]) -> bool:
    return bool(row["codes_changed"] or row["scales_changed"])


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.3%}" if whole else "0 %"


def _tensors(tensors: list[dict[str, Any]]) -> list[str]:
    """The table, a sentence for each untouched group, and in every case one on lm_head, embeddings and norms."""
    if not tensors:
        return ["lm_head, embeddings and norms: not compared with the base, as is every other tensor.", ""]
    rows = []
    for row in tensors:
        share = _percent(row["codes_changed"], row["parameters"])
        counts = [
            f"{row['parameters']:,}",
            "yes" if row.get("trained") else "**no**",
            f"{row['codes_changed']:,}",
            share,
        ]
        rows.append([escape(row["group"]), *counts, f"{row['scales_changed']:,}"])
    head = ["Group", "Parameters", "Trained", "Codes changed", "Share", "Scales changed"]
    lines = table(head, rows, "lrlrrr")
    for name, part in (("lm_head", r"lm_head"), ("embeddings", r"embed|\bwte\b"), ("norms", r"norm|\bln_")):
        group = [row for row in tensors if re.search(part, str(row["group"]))]
        codes, total = (sum(int(row[key]) for row in group) for key in ("codes_changed", "parameters"))
        text = f"{codes:,} of {total:,} stored codes changed ({_percent(codes, total)})"
        if not any(map(_moved, group)):
            text = "no stored value changed" if group else "the file stores no such tensor of its own"
        untrained = [escape(row["group"]) for row in group if not row.get("trained")]
        lines.append(f"- **{name}**: {text}" + (f"; not trained: {', '.join(untrained)}" if untrained else ""))
    for row in tensors:
        if not _moved(row):
            why = ", though it was trained" if row.get("trained") else "; it was not trained"
            lines.append(f"- {escape(row['group'])}: no stored value changed{why}")
    return [*lines, ""]


def _unstable(record: RunRecord) -> list[str]:
    if not record.unstable:
        return ["None: no passing reply was seen to fail when asked alone.", ""]
    rows = [[escape(case.get(key)) for key in ("id", "batched", "alone")] for case in record.unstable]
    return table(["Case", "Reply in a batch", "Reply alone"], rows, "lll")


def _cost(record: RunRecord) -> list[str]:
    rows = [[escape(phase), f"{seconds:.1f}"] for phase, seconds in record.seconds.items()]
    lines = table(["Phase", "Seconds"], rows, "lr") if rows else ["No phase was timed.", ""]
    return [*lines, f"Peak memory (resident): {record.peak_rss_bytes / 2**30:.2f} GiB.", ""]


def _provenance(record: RunRecord) -> list[str]:
    lines = []
    parts = {"Code": record.code, "Data and specs (SHA-256)": record.inputs, "Base": record.base}
    for title, values in (parts | {"Configuration": record.config, "Environment": record.environment}).items():
        rows = [[escape(key), escape(value, REASONS)] for key, value in _flat(values)] or [["–", "–"]]
        lines += [f"<details><summary>{title}</summary>", "", *table(["Key", "Value"], rows, "ll"), "</details>", ""]
    return lines


def _flat(values: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], align: str) -> list[str]:
    """A Markdown table of escaped cells and a blank line; ``align`` has one of l and r for each column."""
    sides = ["left" if side == "l" else "right" for side in align]
    cells = [[str(cell) for cell in row] for row in rows]
    # Left alone, tabulate would read "1e5" as a number and rewrite it.
    text = tabulate(cells, headers=list(headers), tablefmt="pipe", colalign=sides, disable_numparse=True)
    return [*text.split("\n"), ""]


_MARKDOWN = {char: f"\\{char}" for char in "\\`*_[]~"} | {
    "|": "&#124;",
    "$": "&#36;",
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
}


def escape(value: object, limit: int = LIMIT) -> str:
    """``value`` as inline Markdown (and table cell) that shows its characters and nothing else; long text is cut."""
    text = str(value)
    if not text.strip():
        return f"<em>(empty)</em> {'␠' * len(text[:limit])}".rstrip()
    lines = text[:limit].replace("\r\n", "\n").split("\n")
    shown = "<br>".join("".join(_MARKDOWN.get(char, char) for char in visible(line)) for line in lines)
    # Bare addresses become links on GitHub without any markup.
    shown = re.sub(r"(?i)(www)\.", r"\1&#46;", shown.replace("://", "&#58;//"))
    return shown if len(text) <= limit else f"{shown}… <em>({len(text):,} characters, {limit} shown)</em>"


def visible(text: str) -> str:
    """``text`` with a harmless picture for every character that steers a terminal, a line or the reading direction."""
    return "".join(map(_picture, text))


def _picture(char: str) -> str:
    number = ord(char)
    if number < 32 or number == 127:
        return "␡" if number == 127 else chr(0x2400 + number)
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char != "\u200d"  # emoji are joined by it
    return f"⟨U+{number:04X}⟩" if hidden else char


def code(value: object) -> str:
    """``value`` as a code span outside tables."""
    text = visible(str(value))
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _fenced(text: str) -> list[str]:
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return [f"{fence}sh", *map(visible, text.split("\n")), fence, ""]
