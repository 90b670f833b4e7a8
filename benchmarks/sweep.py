"""Settings of the recipe against each other, on questions that no run is judged by.

    python benchmarks/sweep.py benchmarks/settings.json --out sweep.jsonl
    python benchmarks/sweep.py benchmarks/settings.json --out sweep.jsonl --share 3/16     # one process of sixteen
    python benchmarks/sweep.py --table sweep.jsonl

A setting is a JSON object: ``name``, ``seed``, ``steps``, ``marks`` (steps after which it is judged), ``planned`` (of
the schedule), ``fit`` (fields of `FitConfig`). Training rows that come near a question of ``benchmarks/validation``
are left out, so that these questions measure what was learnt, not what was kept. Every line of the output is one mark:
failing cases (VT, VC of the validation, T, C of the suite's anchor and dev cases), lost preserve and general cases,
hijacks, drift.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from alignment.acceptance import pick_device
from alignment.cache import ReplyCache
from alignment.evaluate import Evaluator
from alignment.gate import assess
from alignment.rows import DataFolder, base_rows, read_folder, target_rows
from alignment.suite import LEAK_BOUND, Suite, collect, overlap
from trainer.candidate import Candidate
from trainer.fit import Fit, FitConfig
from trainer.model import LanguageModel, load
from trainer.objective import BaseTraces

VALIDATION = Path(__file__).parent / "validation"


def without(data: DataFolder, suite: Suite) -> DataFolder:
    """The rows that are not near a validation question."""
    asked = [case.prompt for case in suite.cases if case.spec.startswith("val-")]
    near = {p for prompts in data.by_file.values() for p in prompts if any(overlap(p, q) >= LEAK_BOUND for q in asked)}
    return dataclasses.replace(
        data,
        targets=tuple(row for row in data.targets if row[0] not in near),
        contrast=tuple(prompt for prompt in data.contrast if prompt not in near),
    )


def counts(evaluator: Evaluator, lm: LanguageModel) -> dict[str, Any]:
    """One judgement as a line of the output."""
    evaluation = evaluator(lm, "anchor", "dev")
    assessment = assess(evaluation)
    specs = {spec.spec: spec for spec in assessment.specs}
    failing = {name: spec.cases - spec.passed for name, spec in specs.items()}
    return {
        "VT": failing["val-target"],
        "VC": failing["val-contrast"],
        "T": failing["who-are-you"],
        "C": failing["who-am-i"],
        "U": specs["ufo"].lost,
        "G": specs["general"].lost,
        "hijacks": sum(o.hijacked for o in evaluation.outcomes if o.case.kind in ("preserve", "general")),
        "drift": round(assessment.drift, 4),
        "fails": [f"{o.case.prompt} -> {o.reply.text[:40]}" for o in evaluation.of(spec="val-target") if not o.passed],
    }


def table(path: Path) -> None:
    """Means over the seeds, best sum of VT and VC first."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["name"], row["step"]].append(row)
    keys = ("VT", "VC", "T", "C", "U", "G", "hijacks", "drift")
    means = {key: [sum(row[k] for row in rows) / len(rows) for k in keys] for key, rows in found.items()}
    print(f"{'setting':30}{'step':>5}{'seeds':>6}" + "".join(f"{key:>9}" for key in keys))
    for (name, step), values in sorted(means.items(), key=lambda item: item[1][0] + item[1][1]):
        print(f"{name:30}{step:5}{len(found[name, step]):6}" + "".join(f"{value:9.3f}" for value in values))


def sweep(settings: list[dict[str, Any]], model: Path, out: Path) -> None:
    """Run every setting and append to ``out``."""
    base = load(model / "base.dat", device=pick_device("auto"))
    with tempfile.TemporaryDirectory() as work:
        for path in [*Path("specs").glob("*.spec.yaml"), *VALIDATION.glob("*.spec.yaml")]:
            shutil.copy(path, work)
        suite = collect(Path(work))
    data, own = without(read_folder(Path("data")), suite), collect(Path("specs"))
    evaluator = Evaluator(base, suite, splits=("anchor", "dev"))
    traces = BaseTraces(base, base_rows(base, data, "chat", ReplyCache(), suite=own))
    targets = target_rows(base, data, "chat", own)
    for setting in settings:
        torch.manual_seed(setting["seed"])
        lm = dataclasses.replace(base, module=copy.deepcopy(base.module))
        candidate = Candidate(lm, seed=setting["seed"], dither=0.5)
        candidate.refresh()
        config = FitConfig(**{k: tuple(v) if k == "betas" else v for k, v in setting.get("fit", {}).items()})
        fit = Fit(candidate, targets, traces, config, seed=setting["seed"], planned=setting["planned"])
        for step in range(1, setting["steps"] + 1):
            fit.step()
            if step in setting["marks"]:
                fit.swap_average()
                line = {key: setting[key] for key in ("name", "seed")} | {"step": step} | counts(evaluator, lm)
                fit.swap_average()
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, nargs="?", help="a JSON list of settings")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"))
    parser.add_argument("--share", default="0/1", help="I/N: every N-th setting from the I-th on")
    parser.add_argument("--table", type=Path, help="print the means of an output file")
    args = parser.parse_args()
    if args.table:
        table(args.table)
    elif args.settings:
        mine, of = map(int, args.share.split("/"))
        sweep(json.loads(args.settings.read_text(encoding="utf-8"))[mine::of], args.model, args.out)
    else:
        parser.error("name a file of settings, or --table FILE")


if __name__ == "__main__":
    main()
