"""The pytest plugin: every case of a ``*.spec.yaml`` is a test of the weights given with ``--weight``.

    pytest specs/ --weight artifacts/demo.dat
    pytest specs/ --weight x.dat -k who-am-i --junitxml=out.xml
    pytest "specs/who-are-you.spec.yaml::anchor/1 你是誰" --weight x.dat

Before the first test all replies of a folder's suite are generated in one batched pass, for the base and for the
weight; replies that the cache already holds are taken from there. A wrong input is one line and pytest's usage error
(exit 4).

Outcomes follow alignment.gate. A target or contrast case passes or fails; a preserve case fails when the base passes it
and the weight does not; a general case lost against the base is an xfail, for the suite is decided by its ``paired``
test; a preserve or general case that the base itself fails is skipped. ``drift`` (on a folder's first preserve spec)
fails when the KL to the base is out of bound.

Under pytest-xdist every worker judges the file by itself: correct, but slower than one process unless the cache is
warm; a file that fits no model is told by failing tests there.

This module is imported by every pytest run on the machine, so it imports nothing heavy and does nothing until a spec
file is collected. Should another plugin own ``--weight``, ``--model``, ``--base``, ``--template`` or ``--numerics``,
use ``--align-weight`` and so on; a conftest.py that defines one of them needs ``-p no:align``.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignment.show import Shown, SpecFailedError, harmless, name_of, shown

if TYPE_CHECKING:
    from alignment.acceptance import Acceptance
    from alignment.spec import Case, Spec
    from alignment.suite import Suite

SUFFIX = ".spec.yaml"
_OURS = re.compile(r"^(spec: *[\w\"']|says:|cases:)", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("align", "behaviour specs (align)")

    def add(name: str, **settings: Any) -> None:
        try:
            group.addoption(f"--{name}", f"--align-{name}", dest=f"align_{name}", **settings)
        except (ValueError, argparse.ArgumentError):  # another plugin's option: its users must not suffer for ours
            group.addoption(f"--align-{name}", dest=f"align_{name}", **settings)

    add("weight", type=Path, metavar="FILE", help="the .dat to judge by the *.spec.yaml files that are collected")
    add("model", type=Path, metavar="DIR", help="its model folder (default: named by its manifest, or its own folder)")
    add("base", type=Path, metavar="FILE", help="the .dat to compare with (default: the manifest's, or DIR/base.dat)")
    add("template", choices=["chat", "runner"], default="chat", help="how prompts are rendered (default: chat)")
    names = ["weights", "w4a4"]  # as trainer.numerics has them; importing that would bring torch
    add("numerics", choices=names, default="weights", help="w4a4: activations in 4 bits, too (default: weights)")


class Judge:
    """What one pytest run knows about the weight: suites by folder, and what each is worth."""

    def __init__(self, config: pytest.Config) -> None:
        self.weight: Path | None = config.option.align_weight
        self.model: Path | None = config.option.align_model
        self.base: Path | None = config.option.align_base
        self.template: Any = config.option.align_template
        self.numerics: Any = config.option.align_numerics
        self.collect_only = bool(config.option.collectonly)
        self.accepted: dict[Path, Acceptance] = {}
        self.broken: dict[Path, str] = {}
        """Why a folder's suite could not be judged, in a worker of pytest-xdist."""
        self.refusal: pytest.UsageError | None = None
        """The first wrong input, to be raised when collecting is over."""
        self._suites: dict[Path, Suite] = {}
        self._checked = False

    def suite(self, folder: Path) -> Suite:
        """The suite of ``folder``, once the weight's path and headers are known to be good. Raises UsageError."""
        from alignment.spec import SpecError
        from alignment.suite import collect

        self._check_weight(folder)
        try:
            return self._suites.get(folder) or self._suites.setdefault(folder, collect(folder))
        except SpecError as error:
            raise pytest.UsageError(harmless(" ".join(str(error).split()))) from None

    def _check_weight(self, folder: Path) -> None:
        if self._checked or self.collect_only:  # listing the cases needs no weight
            return
        weight = self.weight
        if weight is None:
            raise pytest.UsageError(f"{folder} holds specs (*{SUFFIX}): pass --weight FILE, the .dat to judge by them")
        if weight.is_dir():
            raise pytest.UsageError(f"--weight {weight} is a directory; name the .dat file in it")
        if not weight.exists():
            raise pytest.UsageError(f"--weight {weight}: no such file")
        if not os.access(weight, os.R_OK):
            raise pytest.UsageError(f"--weight {weight} cannot be read: permission denied")
        from alignment import acceptance  # torch from here on
        from alignment.manifest import model_folder_of
        from trainer.dat_errors import DatError

        try:
            acceptance.check_headers(weight)
        except (DatError, OSError) as error:
            raise pytest.UsageError(harmless(f"--weight {acceptance.one_line(error, weight)}")) from None
        try:
            acceptance.base_path(weight, model_folder_of(weight, self.model), self.base)
        except acceptance.INPUT_ERRORS as error:
            raise pytest.UsageError(harmless(acceptance.one_line(error, weight))) from None
        self._checked = True

    def run(self, folder: Path) -> Acceptance:
        """Judge the weight on the whole suite of ``folder``. Raises UsageError."""
        from alignment import acceptance

        assert self.weight is not None, "a run starts only after _check_weight"
        try:
            self.accepted[folder] = acceptance.judge_file(
                self.weight,
                model=self.model,
                base=self.base,
                specs=folder,
                template=self.template,
                numerics=self.numerics,
            )
        except acceptance.INPUT_ERRORS as error:
            raise pytest.UsageError(harmless(acceptance.one_line(error, self.weight))) from None
        return self.accepted[folder]


_JUDGE = pytest.StashKey[Judge]()


def _judge(config: pytest.Config) -> Judge:
    return config.stash.setdefault(_JUDGE, Judge(config))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SpecFile | None:
    if not file_path.name.endswith(SUFFIX):
        return None
    if parent.config.option.align_weight is None and not parent.session.isinitpath(file_path):
        # Others call their files so, too (OpenAPI, Kubernetes): without --weight only those that look like ours count.
        try:
            if not _OURS.search(file_path.read_text(encoding="utf-8-sig")):
                return None
        except (OSError, UnicodeDecodeError):
            return None
    return SpecFile.from_parent(parent, path=file_path)


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> pytest.CollectReport | None:
    """Note wrong input and go on: whatever is raised here or in ``collect`` may end as a collection error (exit 2)."""
    if isinstance(collector, SpecFile):
        judge = _judge(collector.config)
        try:
            judge.suite(collector.path.parent)
        except pytest.UsageError as error:
            judge.refusal = judge.refusal or error
            return pytest.CollectReport(collector.nodeid, "passed", None, [])
    return None


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Raise what was noted, here, where it is a usage error (exit 4), before pytest says that a case is missing."""
    try:
        return (yield)
    finally:
        if refusal := _judge(session.config).refusal:
            raise refusal from None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """The controller of pytest-xdist collects nothing, and an error in a worker is a crash: look at the arguments."""
    if getattr(session.config.option, "dist", "no") == "no" or hasattr(session.config, "workerinput"):
        return
    for argument in session.config.args:
        path = Path(argument.partition("::")[0]).absolute()
        folder = path if path.is_dir() else path.parent
        if path.name.endswith(SUFFIX) or (path.is_dir() and any(path.glob(f"*{SUFFIX}"))):
            _judge(session.config).suite(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Generate every reply before the first test.

    Always over the whole suite, whatever -k selects: a reply depends in its last bit on the batch it was decoded in, so
    a case must not pass alone and fail among its fellows; and ``paired`` and ``drift`` are about all cases.
    """
    judge = _judge(session.config)
    failed = session.testsfailed and not session.config.option.continue_on_collection_errors
    if judge.collect_only or failed:
        return
    folders = dict.fromkeys(item.path.parent for item in session.items if isinstance(item, SpecItem))
    terminal: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    for folder in folders:
        try:
            accepted = judge.run(folder)
        except pytest.UsageError as error:
            if not hasattr(session.config, "workerinput"):
                raise
            judge.broken[folder] = str(error)  # raised in a worker it would be an internal error of pytest-xdist
            continue
        if terminal is not None and session.config.option.verbose >= 0:
            evaluation = accepted.evaluation
            terminal.write_line(
                f"align: {judge.weight} (sha256 {accepted.weight_sha256[:12]}) against its base "
                f"({accepted.base_sha256[:12]}), numerics {accepted.numerics}: "
                f"{len(evaluation.outcomes)} cases, drift {evaluation.drift:.3f}"
            )


class SpecFile(pytest.File):
    """One spec file."""

    def collect(self) -> Iterable[pytest.Item]:
        suite = _judge(self.config).suite(self.path.parent)
        spec = next(spec for spec in suite.specs if spec.path.name == self.path.name)
        for case in spec.cases:
            yield CaseItem.from_parent(self, name=name_of(case), case=case)
        if spec.kind == "general":
            yield PairedItem.from_parent(self, name="paired", spec=spec)
        if spec is next((other for other in suite.specs if other.kind == "preserve"), None):
            yield DriftItem.from_parent(self, name="drift")


class SpecItem(pytest.Item):
    """A test on the folder's Acceptance."""

    @property
    def acceptance(self) -> Acceptance:
        judge, folder = _judge(self.config), self.path.parent
        if why := judge.broken.get(folder):
            raise SpecFailedError(Shown(headline=why, text=why))
        return judge.accepted[folder]

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The report alone; a traceback only for what is a defect of this program."""
        return excinfo.value.shown if isinstance(excinfo.value, SpecFailedError) else super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name.removesuffix(SUFFIX)}/{self.name}"


class CaseItem(SpecItem):
    """One case."""

    def __init__(self, *, case: Case, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case

    def runtest(self) -> None:
        outcome = next(o for o in self.acceptance.evaluation.outcomes if o.case.id == self.case.id)
        if outcome.passed and not outcome.hijacked:
            return
        if outcome.hijacked:
            raise SpecFailedError(shown(outcome))
        if self.case.kind in ("preserve", "general") and not outcome.base_passed:
            pytest.skip("the base itself fails this: nothing to keep")
        if self.case.kind == "general" and not outcome.firm:
            pytest.skip(f"the base itself passes this only by {outcome.base_margin:.2f} nats: nothing to keep")
        if self.case.kind == "general":
            pytest.xfail("lost against the base; the suite's paired gate decides")
        raise SpecFailedError(shown(outcome))


class PairedItem(SpecItem):
    """A general spec as a whole, paired with the base."""

    def __init__(self, *, spec: Spec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec = spec

    def runtest(self) -> None:
        from alignment.gate import mcnemar, paired_ok

        outcomes = self.acceptance.evaluation.of(spec=self.spec.name)
        lost, gained = [o for o in outcomes if o.lost], [o for o in outcomes if o.gained]
        if paired_ok(len(outcomes), len(lost), len(gained)):
            return
        headline = (
            f"{len(lost)} lost against {len(gained)} gained of {len(outcomes)} cases "
            f"(exact McNemar p = {mcnemar(len(lost), len(gained)):.3g})"
        )
        parts = [headline, *(f"lost {o.case.id}\n{shown(o)}" for o in lost)]
        parts += [f"gained {o.case.id}\n{shown(o)}" for o in gained]
        raise SpecFailedError(Shown(headline=headline, text="\n\n".join(map(harmless, parts))))


class DriftItem(SpecItem):
    """How far the weight has moved from the base on preserve and general prompts."""

    def runtest(self) -> None:
        from alignment.gate import DRIFT_BOUND

        acceptance = self.acceptance
        if acceptance.assessment.drift <= DRIFT_BOUND:  # False for NaN, too
            return
        headline = f"drift {acceptance.assessment.drift:.3f} nats a token is above {DRIFT_BOUND:g}"
        measured = [(o.drift, o) for o in acceptance.evaluation.outcomes if o.drift is not None]
        worst = sorted(measured, key=lambda pair: -pair[0])[:5]
        parts = [headline, *(f"{drift:.3f} {o.case.id}\n{shown(o)}" for drift, o in worst)]
        raise SpecFailedError(Shown(headline=headline, text="\n\n".join(map(harmless, parts))))
