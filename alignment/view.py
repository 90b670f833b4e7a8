"""What a run shows while it works: live tables on a terminal, plain lines elsewhere.

The run talks to ``View``; nothing here decides anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from alignment.gate import Assessment
from alignment.record import EvalRecord, StepRecord
from alignment.suite import Suite


def minutes(seconds: float) -> str:
    """``m:ss``."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"


class View:
    """Progress on ``console``. On a terminal things move; elsewhere a line is written when something was finished."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if console is None and not self.console.is_terminal:
            self.console.width = 400  # a log has no width: a step or an evaluation is one line

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(Text(text))

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar over (done, total) of ``what``."""
        started = time.monotonic()
        if not self.console.is_terminal:
            yield lambda done, total: None
        else:
            columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(what, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        self.say(f"{what}: {time.monotonic() - started:.1f} s")

    @contextmanager
    def training(self, suite: Suite, steps: int, seconds: float) -> Iterator[Training]:
        """The view of the loop: at most ``steps`` steps within ``seconds``."""
        training = Training(self, suite, steps, seconds)
        if self.console.is_terminal:
            with Live(training.table(), console=self.console, refresh_per_second=4, transient=True) as live:
                training.live = live
                yield training
        else:
            yield training


class Training:
    """Step, loss, drift, cases in order for each spec, memory and time left."""

    def __init__(self, view: View, suite: Suite, steps: int, seconds: float) -> None:
        self.view, self.steps = view, steps
        self.kinds = suite.kinds()
        self.deadline = time.monotonic() + seconds
        self.live: Live | None = None
        self.latest: StepRecord | None = None
        self.evaluation: EvalRecord | None = None
        self.assessment: Assessment | None = None
        self.rss = 0
        self.judged = ""

    def say(self, text: str) -> None:
        """One line above the table."""
        self.view.say(text)

    def step(self, record: StepRecord | None, rss: int) -> None:
        """A step was taken; ``rss`` is this process's memory in bytes."""
        self.latest, self.rss = record, rss
        self._show()
        if record is not None and not self.live:
            self.say(
                f"step {record.step}/{self.steps}  loss {record.loss:.3f} (target {record.target:.3f}, "
                f"contrast {record.contrast:.3f}, replay {record.replay:.3f})  {record.seconds:.1f} s  "
                f"memory {rss / 2**30:.1f} GiB"
            )

    def evaluating(self, done: int, total: int) -> None:
        """Replies of the running evaluation."""
        self.judged = f"asking {done}/{total}" if done < total else ""
        self._show()

    def evaluated(self, record: EvalRecord, assessment: Assessment) -> None:
        """An evaluation was judged."""
        self.evaluation, self.assessment, self.judged = record, assessment, ""
        self._show()
        cases = ", ".join(f"{name} {good}/{all_}" for name, (good, all_) in record.passed.items())
        self.say(
            f"evaluation at step {record.step}: {'green' if record.green else 'not green'}; {cases}; "
            f"drift {record.drift:.3f} nats; {record.seconds:.1f} s; {minutes(self.deadline - time.monotonic())} left"
        )

    def _show(self) -> None:
        if self.live:
            self.live.update(self.table())

    def table(self) -> Group:
        """The live view as a renderable."""
        head = Table.grid(padding=(0, 2))
        step = self.latest
        head.add_row(
            f"step {step.step if step else 0}/{self.steps}",
            f"loss {step.loss:.3f}" if step else "",
            f"drift {self.evaluation.drift:.3f} nats" if self.evaluation else "",
            f"memory {self.rss / 2**30:.1f} GiB",
            f"{minutes(self.deadline - time.monotonic())} left",
            self.judged,
        )
        specs = Table("spec", "kind", "in order", box=None, padding=(0, 2))
        for name, kind in self.kinds.items():
            good, total = self.evaluation.passed.get(name, (0, 0)) if self.evaluation else (0, 0)
            style = "green" if total and good == total else "yellow"
            specs.add_row(name, kind, Text(f"{good}/{total}" if total else "-", style=style))
        return Group(head, specs)
