"""The report of a run: ``report.md`` for a person, ``report.json`` for a program, ``curves.svg`` for both.

    path = report.write(record, Path("reports/2026-01-01-demo"))

Promises: every field of the record is in it, whatever the verdict and however early the run ended; what a model said is
shown as text, never as Markdown, HTML or terminal commands; the same record gives the same bytes. ``report.md`` is
written last: where it is, the other two are. Does not judge: green, lost and passed are the record's and the gate's.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment import curves, disagree
from alignment.evaluate import Evaluation, Outcome
from alignment.gate import DRIFT_BOUND, Assessment, Verdict, assess
from alignment.manifest import json_bytes
from alignment.markdown import code, escape, fenced, rows_as_they_are, table, visible
from alignment.record import RunRecord
from trainer.files import atomic_write

LONG = 4000
"""Characters shown of a reason; report.json has all of them."""
TO_TRY: dict[Verdict, str] = {
    "red": "read the failing cases below; add training rows that resemble them, or give the run more steps.",
    "regressed": "see below what was lost; lower the learning rate, or add replay and contrast rows like it.",
    "unstable": "read the unstable cases below; train on until those replies are decided by a wider margin.",
    "guarded": "free memory, raise the guard's limit or make the batches smaller, then run the command again.",
}


def write(record: RunRecord, folder: Path) -> Path:
    """Write the three files into ``folder`` (made when missing) and return the path of report.md. Raises OSError."""
    bound = given if isinstance(given := record.config.get("drift_bound"), (int, float)) else DRIFT_BOUND
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
    data = {"format": "align-report-1", **record.plain(), "assessment": assessment, "final": None}
    data |= disagree.data(record)
    if final := record.final:
        more = ("passed", "base_passed", "lost", "gained", "changed")
        cases = [{"id": o.case.id, **vars(o), **{name: getattr(o, name) for name in more}} for o in final.outcomes]
        data["final"] = {"splits": final.splits, "seconds": final.seconds, "drift": final.drift, "cases": cases}
    return data


def _lines(record: RunRecord, assessment: Assessment | None, bound: float) -> list[str]:
    lines = [f"# {record.verdict}: {escape(record.run)}", "", f"**Cause:** {escape(record.cause, LONG)}", ""]
    lines += [f"**What to try:** {TO_TRY[record.verdict]}", ""] if record.verdict in TO_TRY else []
    name, path, digest = (record.base.get(key, "–") for key in ("name", "path", "sha256"))
    lines += [*_artifact(record), f"- Base: {escape(name)}, {code(path)}", f"- Base SHA-256: {code(digest)}"]
    lines += [f"- Started: {escape(record.started)}", ""]
    lines += [*fenced(record.command, "sh"), *_sentences(record, assessment, bound)]
    lines += ["## Specs, before and after", "", *_specs(record, assessment, bound)]
    lines += ["## Replies", "", *_replies(record.final)]
    lines += ["## Where the two numerics disagree", "", *disagree.lines(record, bound)]
    lines += ["## Course of the run", "", *_course(record)]
    lines += ["## Which tensors changed", "", *_tensors(record.tensors)]
    return [*lines, *_outcome(record), *_provenance(record)]


def _artifact(record: RunRecord) -> list[str]:
    if record.artifact is None:
        return ["- Artifact: nothing was exported"]
    path, size = Path(str(record.artifact["path"])), int(record.artifact["bytes"])
    apart = "" if record.verdict == "green" else "not promoted, kept at "
    judged = "accepted" if record.verdict == "green" else "judged, and not accepted"
    proof = f"{judged} in a fresh process" if record.accepted_in_fresh_process else "not judged in a fresh process"
    what = f"- Artifact: **{escape(path.name)}**, {apart}{code(path)}, {size:,} bytes"
    return [what, f"- SHA-256: {code(record.artifact['sha256'])}", f"- Acceptance: {proof}"]


def _sentences(record: RunRecord, assessment: Assessment | None, bound: float) -> list[str]:
    final, tensors = record.final, record.tensors
    changed, kept = [], []
    look = "the cause above and the evaluations below: no final one was made."
    if final and assessment:
        own = [o for o in final.outcomes if o.case.kind in ("target", "contrast")]
        had = [o for o in final.outcomes if o.case.kind in ("preserve", "general") and o.base_passed]
        before, after = sum(o.base_passed for o in own), sum(o.passed for o in own)
        other = sum(o.changed for o in final.outcomes)
        changed.append(f"{other} of {len(final.outcomes)} replies differ from the base's")
        changed.append(f"{after} of {len(own)} target and contrast cases pass (base: {before})")
        still = f"{sum(o.passed for o in had)} of {len(had)} preserve and general cases that the base passes still pass"
        kept.append(f"{still}, at a drift of {final.drift:.4f} nats a token (bound {bound:g})")
        look = _look(record, assessment, had, own)
    if tensors:
        same = [escape(row["group"]) for row in tensors if not _moved(row)]
        changed.append(_moves(tensors))
        kept.append(f"no stored value changed in {', '.join(same)}" if same else "no tensor group is untouched")
    return [
        f"**What changed:** {'; '.join(changed) or 'nothing that was measured'}.\n",
        f"**What did not:** {'; '.join(kept) or 'nothing was measured; the base itself is never written to'}.\n",
        f"**What to look at:** {look}\n",
    ]


def _look(record: RunRecord, assessment: Assessment, had: Sequence[Outcome], own: Sequence[Outcome]) -> str:
    if assessment.reasons:
        more = len(assessment.reasons) - 1
        return escape(assessment.reasons[0]) + (f" (and {more} more below)" if more else "") + "."
    if record.unstable:
        return f"{len(record.unstable)} passing cases fail when asked alone, first {escape(record.unstable[0]['id'])}."
    if lost := [o for o in had if o.lost]:
        return f"{len(lost)} lost within tolerance, first {escape(lost[0].case.prompt)}: {escape(lost[0].reply.text)}"
    if not own:
        return "there are no target and contrast cases: nothing new was asked of the model."
    near = min(own, key=lambda o: o.reply.margin)
    what = f"{escape(near.case.prompt)}, answered {escape(near.reply.text)}"
    return f"{what}: decided most narrowly of all target and contrast replies ({near.reply.margin:.2f} nats)."


def _specs(record: RunRecord, assessment: Assessment | None, bound: float) -> list[str]:
    final = record.final
    if assessment is None or final is None:
        return ["No final evaluation was made.", ""]
    after = "the artifact, read back from disk" if record.accepted_in_fresh_process else "the last candidate judged"
    head = ["Cases", "Base passed", "Now passed", "Lost", "Gained"]
    rows = [
        [escape(s.spec), s.kind, s.cases, s.base_passed, s.passed, s.lost, s.gained, "yes" if s.green else "**no**"]
        for s in assessment.specs
    ]
    lines = [f"Before is the base, after is {after}.", "", *table(["Spec", "Kind", *head, "Green"], rows, "llrrrrrl")]
    if assessment.reasons:
        lines += ["Not green because:", "", *(f"- {escape(reason, LONG)}" for reason in assessment.reasons), ""]
    rows = []
    for spec, split in dict.fromkeys((o.case.spec, o.case.split) for o in final.outcomes):
        some = final.of(spec=spec, split=split)
        counts = [sum(getattr(o, name) for o in some) for name in ("base_passed", "passed", "lost", "gained")]
        rows.append([escape(spec), split, len(some), *counts])
    lines += ["By split:", "", *table(["Spec", "Split", *head], rows, "llrrrrr")]
    measured = [o for o in final.outcomes if o.drift is not None]
    text = f"Drift: KL(base‖candidate) is {final.drift:.4f} nats/token over {len(measured)} cases (bound {bound:g})"
    if measured:
        worst = max(measured, key=lambda o: math.inf if math.isnan(o.drift or 0.0) else o.drift or 0.0)
        text += f", at most {worst.drift:.4f} at {escape(worst.case.prompt)}"
    return [*lines, f"{text}. Looping where the base does not: {final.looping:.1%} of the replies.", ""]


def _replies(final: Evaluation | None) -> list[str]:
    if final is None:
        return ["No final evaluation was made.", ""]
    lines = ["Every target and contrast reply, and of the other specs every reply that differs from the base's.", ""]
    for spec in dict.fromkeys(o.case.spec for o in final.outcomes):
        kind = (outcomes := final.of(spec=spec))[0].case.kind
        shown = [o for o in outcomes if kind in ("target", "contrast") or o.changed]
        failed = sum(not o.passed for o in shown)
        title = f"{visible(spec)} ({kind}): {len(shown)} of {len(outcomes)} replies shown, {failed} of these fail"
        lines += [f"<details><summary>{html.escape(title)}</summary>", ""]
        rows = rows_as_they_are(["Case", "Prompt", "Base reply", "Reply", "Result"], [_reply(o) for o in shown])
        lines += rows if shown else ["Every reply is the base's."]
        lines += ["", "</details>", ""]
    return lines


def _reply(outcome: Outcome) -> list[str]:
    case, reply = outcome.case, outcome.reply
    result = "passed (gained)" if outcome.gained else "passed"
    if not outcome.passed:
        against = "lost" if outcome.lost else "the base fails too"
        result = f"**failed** ({against}): {escape('; '.join(outcome.failures))}"
    end = "" if reply.stopped else " <em>(token limit)</em>"
    texts = (escape(case.prompt), escape(outcome.base_reply.text), escape(reply.text) + end)
    return [f"{case.split} {case.number}", *texts, result]


def _course(record: RunRecord) -> list[str]:
    steps, evals = record.steps, record.evals
    if not (steps or evals):
        return ["No step was taken and nothing was evaluated on the way.", ""]
    lines = [f"![{curves.alt(steps, evals)}](curves.svg)", ""]
    if not evals:
        return [*lines, "Nothing was evaluated on the way.", ""]
    names, rows = list(dict.fromkeys(name for e in evals for name in e.passed)), []
    for e in evals:
        counts = ["/".join(map(str, e.passed.get(name, ("–",)))) for name in names]
        decision = e.decision + (" (green)" if e.green and e.decision != "green" else "")
        rows.append([e.step, f"{e.drift:.4f}", *counts, decision, escape("; ".join(e.reasons) or "–")])
    head = ["Step", "Drift", *map(escape, names), "Decision", "Reasons"]
    body = table(head, rows, "rr" + "r" * len(names) + "ll")
    return [*lines, f"<details><summary>All {len(evals)} evaluations</summary>", "", *body, "</details>", ""]


def _moved(row: dict[str, Any]) -> bool:
    return bool(row["codes_changed"] or row["scales_changed"])


def _moves(rows: Sequence[dict[str, Any]]) -> str:
    codes, total, scales = (sum(row[key] for row in rows) for key in ("codes_changed", "parameters", "scales_changed"))
    return f"{codes:,} of {total:,} stored codes ({codes / max(total, 1):.3%}) and {scales:,} scales changed"


def _tensors(tensors: list[dict[str, Any]]) -> list[str]:
    """The table, a sentence for each untouched group, and in every case one on lm_head, embeddings and norms."""
    if not tensors:
        return ["lm_head, embeddings and norms: not compared with the base, as is every other tensor.", ""]
    rows = []
    for row in tensors:
        codes, total = row["codes_changed"], row["parameters"]
        counts = (f"{codes:,}", f"{codes / max(total, 1):.3%}", f"{row['scales_changed']:,}")
        rows.append([escape(row["group"]), f"{total:,}", "yes" if row.get("trained") else "**no**", *counts])
    head = ["Group", "Parameters", "Trained", "Codes changed", "Share", "Scales changed"]
    lines = table(head, rows, "lrlrrr")
    for name, part in (("lm_head", r"lm_head"), ("embeddings", r"embed|\bwte\b"), ("norms", r"norm|\bln_")):
        some = [row for row in tensors if re.search(part, str(row["group"]))]
        text = _moves(some) if any(map(_moved, some)) else "no stored value changed"
        text = text if some else "the file stores no such tensor of its own"
        untrained = [escape(row["group"]) for row in some if not row.get("trained")]
        lines.append(f"- **{name}**: {text}" + (f"; not trained: {', '.join(untrained)}" if untrained else ""))
    why = {True: ", though it was trained", False: "; it was not trained"}
    still = [(escape(row["group"]), why[bool(row.get("trained"))]) for row in tensors if not _moved(row)]
    lines += [f"- {group}: no stored value changed{reason}" for group, reason in still]
    return [*lines, ""]


def _outcome(record: RunRecord) -> list[str]:
    rows = [[escape(case.get(key)) for key in ("id", "batched", "alone")] for case in record.unstable]
    lines = ["## Unstable cases", "", "Passing cases whose reply fails at batch size 1.", ""]
    lines += [*table(["Case", "Reply in a batch", "Reply alone"], rows, "lll"), "## Time and memory", ""]
    lines += table(["Phase", "Seconds"], [[escape(k), f"{v:.1f}"] for k, v in record.seconds.items()], "lr")
    return [*lines, f"Peak memory (resident): {record.peak_rss_bytes / 2**30:.2f} GiB.", ""]


def _provenance(record: RunRecord) -> list[str]:
    lines = ["## Provenance", ""]
    parts = {"Code": record.code, "Data and specs (SHA-256)": record.inputs, "Base": record.base}
    for title, values in (parts | {"Configuration": record.config, "Environment": record.environment}).items():
        body = fenced(json_bytes(values).decode().strip(), "json")
        lines += [f"<details><summary>{title}</summary>", "", *body, "</details>", ""]
    return lines
