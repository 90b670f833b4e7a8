"""From a candidate's file to an accepted artifact."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from alignment.acceptance import Acceptance
from alignment.config import RunConfig
from alignment.record import RunRecord
from alignment.suite import Suite
from trainer.files import sha256_file


def accept(record: RunRecord, config: RunConfig, file: Path, suite: Suite, device: torch.device) -> None:
    """Judge ``file`` on every split in a process that has never seen the candidate; the answer goes into ``record``."""
    # A fresh interpreter: nothing of this process's memory can vouch for the file.
    with tempfile.TemporaryDirectory() as work:
        answer = Path(work) / "acceptance.json"
        command = [
            *(sys.executable, "-m", "alignment.acceptance", str(file), "--json", str(answer)),
            *("--model", str(config.base_file.parent), "--base", str(config.base_file)),
            *("--specs", str(config.specs), "--template", config.template, "--device", str(device)),
            *("--drift-bound", str(config.drift_bound), "--numerics", config.numerics),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0 or not answer.is_file():
            tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
            record.verdict, record.cause = (
                "red",
                f"the exported file could not be judged in a fresh process: {tail}",
            )
            return
        accepted = Acceptance.from_json(json.loads(answer.read_text(encoding="utf-8")), suite)
    if accepted.weight_sha256 != sha256_file(file):
        record.verdict, record.cause = "red", "the exported file changed between writing and judging"
        return
    record.final, record.assessment = accepted.evaluation, accepted.assessment
    record.unstable, record.accepted_in_fresh_process = accepted.unstable, True
    record.other = accepted.other
    if not accepted.assessment.green:
        record.verdict = "red"
        record.cause = f"the exported file is not green: {'; '.join(accepted.assessment.reasons)}"
    elif accepted.unstable:
        record.verdict = "unstable"
        record.cause = f"{len(accepted.unstable)} passing case(s) fail when asked alone: " + "; ".join(
            f"{row['id']!r} -> {row['alone']!r}" for row in accepted.unstable[:3]
        )


def promote(file: Path, out: Path) -> Path:
    """Move the accepted file to its name; across file systems through a copy beside it, so that no half file shows."""
    try:
        return file.replace(out)
    except OSError:
        near = out.with_name(f".{out.name}.new")
        shutil.copyfile(file, near)
        near.replace(out)
        file.unlink()
        return out
