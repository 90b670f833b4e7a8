"""Until green: fit, evaluate, gate, export, accept.

    record = run(RunConfig(base=Path("models/smollm2-135m"), out=Path("artifacts/demo.dat")), view=View())

The loop knows nothing of how weights are stored and the trainer nothing of behaviours; this module joins them.
Promises: every evaluation sees shipping numerics; green means two green evaluations in a row, the last with the
learning rate down or the steps spent, and then the file itself, judged by a fresh process on every split; nothing that
is not green stands at ``out``.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import shlex
import time

import psutil
import torch

from alignment import manifest, report
from alignment.acceptance import pick_device
from alignment.cache import ReplyCache
from alignment.config import RunConfig, RunError, plain_config, refuse_overwriting
from alignment.deliver import accept, promote
from alignment.evaluate import Evaluation, Evaluator
from alignment.gate import Assessment, History, Verdict, assess
from alignment.record import EvalRecord, RunRecord, StepRecord
from alignment.rows import base_rows, read_folder, target_rows
from alignment.suite import collect, refuse_leaks
from alignment.view import View
from trainer import host
from trainer.candidate import Candidate
from trainer.dat_diff import diff
from trainer.files import sha256_file
from trainer.fit import Fit, FitError
from trainer.model import folder_sha256, load
from trainer.objective import BaseTraces

CONFIRM_AFTER = 2
"""Steps between a green evaluation and the one that confirms it: a pass that two small steps undo was none."""

NEARLY = 4
"""Failing target and contrast cases up to which evaluations come six times as often."""


class _Run:
    """One run's moving parts."""

    def __init__(self, config: RunConfig, view: View, command: str) -> None:
        self.config, self.view = config, view
        self.started = time.monotonic()
        self._phase_started = self.started
        now = datetime.datetime.now(datetime.UTC)
        self.suite = collect(config.specs)
        self.data = read_folder(config.data)
        refuse_leaks(self.suite, self.data.by_file)
        refuse_overwriting(config)
        if not config.base_file.is_file():
            raise RunError(
                f"--base {config.base}: no {config.base_file}; `align models` lists bases, "
                f"`align models get NAME` makes one"
            )
        self.device = pick_device(config.device)
        self.process = psutil.Process()
        self.record = RunRecord(
            run=f"{now:%Y%m%d-%H%M%S}-{config.out.stem}-seed{config.seed}",
            verdict="red",
            cause="",
            command=command,
            started=now.isoformat(timespec="seconds"),
            base={},
            artifact=None,
            inputs={**self.data.hashes, str(config.specs): self.suite.sha256},
            config=plain_config(config),
            environment=manifest.environment(),
            code=manifest.code_revision(),
        )
        self.folder = config.reports / self.record.run

    def phase(self, name: str) -> None:
        """End the phase that ran until now."""
        now = time.monotonic()
        self.record.seconds[name] = self.record.seconds.get(name, 0.0) + now - self._phase_started
        self._phase_started = now
        self._memory()

    def _memory(self) -> int:
        rss = int(self.process.memory_info().rss)
        self.record.peak_rss_bytes = max(self.record.peak_rss_bytes, rss)
        return rss

    def prepare(self) -> None:
        """Load base and candidate; ask the base for every reply that it is the yardstick of."""
        config, view = self.config, self.view
        base_file = config.base_file
        view.say(f"base {base_file}")
        torch.manual_seed(config.seed)
        base = load(base_file, device=self.device, numerics=config.numerics)
        lm = dataclasses.replace(base, module=copy.deepcopy(base.module))
        self.record.base = {
            "name": base_file.parent.name,
            "path": str(base_file),
            "sha256": base.weights_sha256,
            "folder": str(base.folder),
            "folder_sha256": folder_sha256(base.folder),
        }
        self.record.environment |= {"device": str(self.device), "dtype": str(base.dtype)}
        self.phase("load")
        cache = ReplyCache()
        with view.progress("base replies to the suite") as progress:
            self.evaluator = Evaluator(base, self.suite, template=config.template, cache=cache, progress=progress)
        with view.progress("base replies to contrast and replay prompts") as progress:
            rows = base_rows(
                base, self.data, config.template, cache, suite=self.suite, seed=config.seed, progress=progress
            )
        traces = BaseTraces(base, rows)
        self.candidate = Candidate(lm, rule=config.rule, seed=config.seed, dither=config.dither)
        self.candidate.refresh()
        self.fit = Fit(
            self.candidate,
            target_rows(lm, self.data, config.template, self.suite),
            traces,
            config.fit,
            seed=config.seed,
            planned=config.steps,
        )
        self.phase("base replies")

    def train(self) -> tuple[Verdict, str]:
        """Fit and evaluate until the gate says stop. ``green`` here means ready to export."""
        config, view, history = self.config, self.view, History()
        deadline = self.started + 60 * config.budget_minutes
        good = self.fit.snapshot()
        tries = 0
        assessment: Assessment | None = None
        reasons: tuple[str, ...] = ()
        with view.training(self.suite, config.steps, deadline - time.monotonic()) as live:
            taken, next_evaluation = 0, config.eval_every
            while taken < config.steps and time.monotonic() < deadline:
                try:
                    result = self.fit.step()
                    broken = ""
                except FitError as error:
                    broken = str(error)
                taken += 1
                if not broken:
                    self.record.steps.append(
                        StepRecord(
                            step=taken,
                            lr=self.fit.lr,
                            **dataclasses.asdict(result),
                        )
                    )
                live.step(self.record.steps[-1] if self.record.steps else None, self._memory())
                self.phase("training")
                due = taken >= next_evaluation or taken == config.steps or time.monotonic() >= deadline
                if not due and not broken:
                    continue
                if broken:
                    decision, reasons = "step-back", (broken,)
                else:
                    self.fit.swap_average()
                    evaluation = self.evaluator(self.candidate.lm, "anchor", "dev", progress=live.evaluating)
                    assessment = assess(evaluation, drift_bound=config.drift_bound)
                    decision = history.decide(assessment)
                    reasons = history.reasons if decision == "step-back" else assessment.reasons
                    self.record.final, self.record.assessment = evaluation, assessment
                    self._note(taken, evaluation, assessment, decision, reasons)
                    live.evaluated(self.record.evals[-1], assessment)
                    next_evaluation = taken + self._pause(assessment)
                    host.trim()
                    self.phase("evaluation")
                if decision == "green" and config.until_green and (self.fit.settled or taken == config.steps):
                    return "green", f"every spec was green in two evaluations in a row, the last after step {taken}"
                if decision == "step-back":
                    tries += 1
                    if tries > config.retries:
                        return (
                            "regressed",
                            f"stepped back {config.retries} times; at last after step {taken}: {'; '.join(reasons)}",
                        )
                    self.fit.restore(good)
                    self.fit.lr_scale /= 2
                    live.say(f"step {taken}: {'; '.join(reasons)}; back to the last good weights, half the step size")
                    continue
                if assessment is not None and not assessment.harmed:
                    good.clear()  # before the copy: two would be the largest thing in memory
                    good |= self.fit.snapshot()
                self.fit.swap_average()
        self.fit.swap_average()
        if not config.until_green and assessment is not None and assessment.green:
            return "green", f"{taken} of {config.steps} steps taken; every spec green at the end"
        limit = f"{config.steps} steps" if taken >= config.steps else f"{config.budget_minutes:g} minutes"
        missing = (
            "; ".join(assessment.reasons)
            if assessment and assessment.reasons
            else "a second green in a row, once the learning rate is down"
        )
        return "red", f"the budget of {limit} is spent; still missing: {missing}"

    def _pause(self, assessment: Assessment) -> int:
        """Steps until the next evaluation: fewer the nearer it is to green, once the learning rate has come down."""
        if not self.fit.settled:
            return min(self.config.eval_every, self.fit.until_settled)
        if assessment.green:
            return CONFIRM_AFTER
        failing = sum(spec.cases - spec.passed for spec in assessment.specs if spec.kind in ("target", "contrast"))
        return max(1, self.config.eval_every // 6) if failing <= NEARLY else self.config.eval_every

    def _note(
        self, step: int, evaluation: Evaluation, assessment: Assessment, decision: str, reasons: tuple[str, ...]
    ) -> None:
        passed = {
            spec.spec: (spec.cases - spec.lost if spec.kind in ("preserve", "general") else spec.passed, spec.cases)
            for spec in assessment.specs
        }
        self.record.evals.append(
            EvalRecord(
                step=step,
                drift=assessment.drift,
                green=assessment.green,
                decision=decision,
                passed=passed,
                reasons=reasons,
                seconds=evaluation.seconds,
            )
        )

    def finish(self, verdict: Verdict, cause: str) -> RunRecord:
        """Export, accept in a fresh process when the candidate is green, and write manifest and report."""
        record, config = self.record, self.config
        record.verdict, record.cause = verdict, cause
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / ("candidate.dat" if verdict == "green" else f"{verdict}.dat")
        self.view.say(f"exporting {file}")
        self.candidate.export(file)
        record.tensors = [group.to_json() | {"trained": True} for group in diff(config.base_file, file).groups]
        self.phase("export")
        del self.fit  # masters and moments: the fresh process needs the memory
        if verdict == "green":
            self.view.say("judging the file in a fresh process, every split")
            accept(record, config, file, self.suite, self.device)
            self.phase("acceptance")
        if record.verdict == "green":
            config.out.parent.mkdir(parents=True, exist_ok=True)
            kept = promote(file, config.out)
        elif file.name == "candidate.dat":
            kept = file.rename(self.folder / f"{record.verdict}.dat")
        else:
            kept = file
        record.artifact = {"path": str(kept), "sha256": sha256_file(kept), "bytes": kept.stat().st_size}
        self.phase("writing")
        path = report.write(record, self.folder)
        manifest.write(record, kept, path)
        return record


def run(config: RunConfig, *, view: View, command: str = "") -> RunRecord:
    """Do one run and return its record; report and manifest are then on disk.

    Raises RunError, SpecError, DataError, DatError or ModelError before anything is trained.
    """
    this = _Run(config, view, command or shlex.join(["align", "run"]))
    this.prepare()
    verdict, cause = this.train()
    return this.finish(verdict, cause)
