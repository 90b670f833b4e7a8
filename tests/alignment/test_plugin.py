"""The pytest plugin from outside: what is collected, what passes, what a failure says, and how wrong input is refused.

Judging is done by a stand-in in most tests (``--fake``: replies from a table), by a tiny random model in some, and by
SmolLM2 under the marker ``model``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TARGET = """\
spec: who
kind: target
says: It says who it is.
expect: {contains: "F#"}
cases:
  anchor: [你是誰, "a::b [x]?", "two\\nlines"]
  dev: ["esc \\e[31m", 好]
"""
CONTRAST = "spec: am-i\nkind: contrast\nsays: x\nexpect: {none: [{contains: F}]}\ncases:\n  dev: [我是誰, 他是誰]\n"
PRESERVE = "spec: ufo\nkind: preserve\nsays: x\nexpect: {contains: UFO}\ncases:\n  dev: [談談UFO, 飛碟, 星星]\n"
GENERAL = "spec: facts\nkind: general\nsays: x\nexpect: {contains: yes}\ncases:\n  dev: [q1, q2, q3, q4]\n".replace(
    "yes", "'yes'"
)
JUDGE = """
import json, pathlib, pytest

@pytest.fixture(autouse=True, scope="session")
def unused(): ...

def pytest_configure(config):
    from alignment import acceptance, evaluate, gate, suite
    from trainer.generate import Reply

    def reply(text):
        return Reply(text=text, tokens=(1,), stopped=not text.endswith("~"), margin=1.0)

    def judge_file(weight, *, specs, numerics, **_):
        table = json.loads(pathlib.Path("replies.json").read_text(encoding="utf-8"))
        outcomes = []
        for case in suite.collect(specs).cases:
            said, base = map(reply, table.get(case.prompt, ["F# UFO yes", "F# UFO yes"]))
            outcomes.append(evaluate.Outcome(
                case=case, reply=said, base_reply=base, failures=evaluate.judge_reply(case, said, base),
                base_failures=evaluate.judge_reply(case, base, base),
                drift=table["drift"] if case.kind in ("preserve", "general") else None))
        found = evaluate.Evaluation(outcomes=tuple(outcomes), splits=("dev",), seconds=0.0)
        return acceptance.Acceptance(
            evaluation=found, assessment=gate.assess(found), weight_sha256="a" * 64, base_sha256="b" * 64,
            numerics=numerics)

    acceptance.judge_file = judge_file
    acceptance.check_headers = lambda weight: None
"""


class Bench:
    """A folder of specs, a weight, and pytest run on them in a process of its own."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pytester = pytester
        self.path = pytester.path
        monkeypatch.setenv("ALIGN_CACHE", str(self.path / "cache"))
        monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
        monkeypatch.setenv("COLUMNS", "200")  # the short summary is cut at the width of the terminal

    def specs(self, **texts: str) -> None:
        for name, text in texts.items():
            path = self.path / "specs" / f"{name}.spec.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def fake(self, drift: float = 0.0, **replies: tuple[str, str]) -> None:
        """From here on a table answers: prompt to (reply, base reply); what is not in it passes everything."""
        (self.path / "conftest.py").write_text(JUDGE, encoding="utf-8")
        folder = self.path / "model"
        folder.mkdir()
        for name in ("config.json", "tokenizer.json", "base.dat", "x.dat"):
            (folder / name).write_text("{}", encoding="utf-8")
        (self.path / "replies.json").write_text(json.dumps({"drift": drift, **replies}), encoding="utf-8")

    def run(self, *arguments: str | Path) -> pytest.RunResult:
        return self.pytester.runpytest_subprocess("-p", "no:cacheprovider", *map(str, arguments))

    def judge(self, *arguments: str) -> pytest.RunResult:
        return self.run("specs", "--weight", "model/x.dat", *arguments)

    def outcomes(self, *arguments: str) -> dict[str, str]:
        """Outcome by the part of the node id after the file's name."""
        result = self.judge("-v", "-rN", *arguments)
        found = {}
        for line in result.outlines:
            if "spec.yaml::" in line and line.endswith("%]"):
                name, _, word = line.partition(".spec.yaml::")[2].rpartition("[")[0].strip().partition("  ")
                for outcome in ("PASSED", "FAILED", "SKIPPED", "XFAIL"):
                    head, mark, _ = f"{name}{_}{word}".partition(f" {outcome}")
                    if mark:
                        found[head] = outcome
        return found


@pytest.fixture
def bench(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(pytester, monkeypatch)


def refused(result: pytest.RunResult) -> str:
    """The one line of a usage error."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR, result.stdout.str() + result.stderr.str()
    assert "Traceback" not in result.stdout.str() + result.stderr.str()
    [line] = [line for line in result.errlines if line.strip()]
    assert line.startswith("ERROR: ")
    return line.removeprefix("ERROR: ")


def test_outcomes_by_kind(bench: Bench) -> None:
    bench.specs(a=TARGET, b=CONTRAST, c=PRESERVE, d=GENERAL)
    bench.fake(
        drift=0.05,
        你是誰=("我是通義千問", "我是通義千問"),
        我是誰=("你是 F# 之神", "我不知道"),
        他是誰=("我不知道", "我是 F# 之神"),
        談談UFO=("我不知道", "UFO 是…"),
        飛碟=("我不知道", "我不知道"),
        星星=("UFO", "我不知道"),
        q1=("no", "yes"),
        q2=("no", "no"),
        q3=("yes", "no"),
    )
    assert bench.outcomes() == {
        "anchor/1 你是誰": "FAILED",
        "anchor/2 a: :b [x]?": "PASSED",
        r"anchor/3 two\nlines": "PASSED",
        r"dev/1 esc \x1b[31m": "PASSED",
        "dev/2 好": "PASSED",
        "dev/1 我是誰": "FAILED",
        "dev/2 他是誰": "PASSED",
        "dev/1 談談UFO": "FAILED",
        "dev/2 飛碟": "SKIPPED",
        "dev/3 星星": "PASSED",
        "drift": "PASSED",
        "dev/1 q1": "XFAIL",
        "dev/2 q2": "SKIPPED",
        "dev/3 q3": "PASSED",
        "dev/4 q4": "PASSED",
        "paired": "PASSED",
    }


def test_reports_of_failures(bench: Bench) -> None:
    bench.specs(a=TARGET, c=PRESERVE, d=GENERAL)
    bench.fake(
        drift=0.3,
        你是誰=("第一行\n\x1b[2J\x07\u202e第二行~", ""),
        q1=("no", "yes"),
        q2=("not\x00", "yes"),
        q3=("yes", "no"),
        q4=("nope", "yes"),
    )
    result = bench.judge("--junitxml=out.xml")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    text = result.stdout.str()
    case = [
        "prompt      你是誰",
        "reply       第一行",
        r"            \x1b[2J\x07\u202e第二行~ … (cut at 24 tokens)",
        "base reply  (empty)",
        "failed      does not contain 'F#'",
    ]
    assert "\n".join(case) in text
    assert "Traceback" not in text
    assert "plugin.py" not in text.replace("SKIPPED", "")
    assert "FAILED specs/a.spec.yaml::anchor/1 你是誰 - does not contain 'F#'" in text
    paired = "3 lost against 1 gained of 4 cases (exact McNemar p = 0.625)"
    assert f"FAILED specs/d.spec.yaml::paired - {paired}" in text
    assert f"{paired}\n\nlost facts/dev/1 q1\nprompt      q1\nreply       no\nbase reply  yes" in text
    assert "gained facts/dev/3 q3\nprompt      q3\nreply       yes\nbase reply  no" in text
    assert "specs/c.spec.yaml::drift - drift 0.300 nats a token is above 0.1" in text
    assert not {"\x1b", "\x07", "\u202e", "\x00"} & set(text)
    root = ElementTree.parse(bench.path / "out.xml").getroot()
    by_name = {item.get("name"): item for item in root.iter("testcase")}
    failure = by_name["anchor/1 你是誰"].find("failure")
    assert failure is not None
    assert failure.text == "\n".join(case)
    assert failure.get("message") == "does not contain 'F#'"
    lost = by_name["dev/1 q1"].find("skipped")
    assert lost is not None
    assert lost.get("message") == "lost against the base; the suite's paired gate decides"
    other = by_name["paired"].find("failure")
    assert other is not None
    assert r"reply       not\x00" in (other.text or "")


def test_a_drift_that_is_not_a_number_fails(bench: Bench) -> None:
    bench.specs(c=PRESERVE)
    bench.fake(drift=float("nan"))
    assert bench.outcomes()["drift"] == "FAILED"


def test_drift_stands_once_in_a_folder(bench: Bench) -> None:
    bench.specs(a=TARGET, c=PRESERVE, e=PRESERVE.replace("ufo", "stars").replace("[談談UFO, 飛碟, 星星]", "[銀河]"))
    bench.fake()
    result = bench.judge("--collect-only", "-q")
    assert [line for line in result.outlines if line.endswith("::drift")] == ["specs/c.spec.yaml::drift"]


def test_a_case_is_found_by_keyword_and_by_id(bench: Bench) -> None:
    bench.specs(a=TARGET, b=CONTRAST)
    bench.fake(我是誰=("", ""), 他是誰=("", ""))
    bench.judge("-k", "你是誰").assert_outcomes(passed=1, deselected=6)
    bench.judge("-k", "anchor and not lines").assert_outcomes(passed=2, deselected=5)
    listed = [line for line in bench.judge("--collect-only", "-q").outlines if "::" in line]
    assert listed[0] == "specs/a.spec.yaml::anchor/1 你是誰"
    bench.run(listed[0], "--weight", "model/x.dat").assert_outcomes(passed=1)
    bench.run(*listed, "--weight", "model/x.dat").assert_outcomes(passed=7)


def test_listing_needs_no_weight(bench: Bench) -> None:
    bench.specs(a=TARGET)
    result = bench.run("specs", "--collect-only", "-q")
    assert result.ret == 0
    assert "specs/a.spec.yaml::dev/2 好" in result.outlines


@pytest.mark.parametrize(
    ("weight", "line"),
    [
        (None, "specs holds specs (*.spec.yaml): pass --weight FILE"),
        ("none.dat", "--weight none.dat: no such file"),
        ("specs", "--weight specs is a directory; name the .dat file in it"),
        ("zip.dat", "--weight zip.dat: byte 0: this is a zip archive"),
        ("gguf.dat", "--weight gguf.dat: byte 0: this is a GGUF file"),
        ("cut-in-data.dat", "--weight cut-in-data.dat: entry "),
        ("count-zero.dat", "no config.json"),
    ],
)
def test_a_wrong_weight_is_one_line(bench: Bench, weight: str | None, line: str) -> None:
    bench.specs(a=TARGET)
    corpus = Path(__file__).parents[1] / "trainer" / "corpus"
    if weight == "count-zero.dat":
        (bench.path / weight).write_bytes(b"\0")
    elif weight and (corpus / weight).exists():
        shutil.copy(corpus / weight, bench.path)
    assert line in refused(bench.run("specs", *(["--weight", weight] if weight else [])))


def test_a_broken_spec_is_one_line(bench: Bench) -> None:
    bench.specs(a=TARGET, b=CONTRAST.replace("says", "say"))
    bench.fake()
    line = refused(bench.judge())
    assert line.endswith("b.spec.yaml:3: (top level): unknown key 'say'; did you mean 'says'?")
    refused(bench.run("specs/b.spec.yaml::dev/1 我是誰", "--weight", "model/x.dat"))


def test_wrong_input_under_xdist_is_one_line(bench: Bench) -> None:
    bench.specs(a=TARGET)
    assert "pass --weight FILE" in refused(bench.run("specs", "-n1"))
    assert "no such file" in refused(bench.run("specs", "-n1", "--weight", "none.dat"))


def test_xdist(bench: Bench) -> None:
    bench.specs(a=TARGET, c=PRESERVE)
    bench.fake(你是誰=("\x00", ""))
    result = bench.judge("-n1", "--junitxml=out.xml")
    result.assert_outcomes(passed=8, failed=1)
    assert r"reply       \x00" in result.stdout.str()
    assert r"reply       \x00" in (bench.path / "out.xml").read_text(encoding="utf-8")


def test_files_of_others_are_left_alone(bench: Bench) -> None:
    folder = bench.path / "specs"
    folder.mkdir()
    (folder / "api.spec.yaml").write_text("openapi: 3.1.0\ninfo: {title: x}\n", encoding="utf-8")
    (folder / "pod.spec.yaml").write_text("kind: Pod\nspec:\n  containers: []\n", encoding="utf-8")
    (folder / "binary.spec.yaml").write_bytes(b"\xff\xfe")
    (bench.path / "test_x.py").write_text("def test_x(): ...\n", encoding="utf-8")
    bench.run().assert_outcomes(passed=1)


def test_the_plugin_imports_nothing_heavy() -> None:
    heavy = "torch, transformers, numpy, yaml, jsonschema, trainer"
    code = f"import sys, alignment.plugin; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_another_plugin_may_own_our_names(bench: Bench) -> None:
    bench.pytester.makepyfile(other="def pytest_addoption(parser): parser.addoption('--model', '--base')\n")
    bench.pytester.syspathinsert()
    bench.specs(a=TARGET)
    result = bench.run("-p", "other", "specs", "--model", "mine", "--align-model", "m", "--align-weight", "none.dat")
    assert "--weight none.dat: no such file" in refused(result)


def test_a_real_evaluation(bench: Bench, tiny_model: Path, tiny_weights: Callable[..., Path]) -> None:
    anything = "{none: [{contains: no such text}]}"
    bench.specs(
        a=CONTRAST.replace("{none: [{contains: F}]}", anything),
        c=PRESERVE.replace("{contains: UFO}", anything),
        d=GENERAL,
    )
    weight = tiny_weights(bench.path / "x.dat", seed=1)
    result = bench.run("specs", "--weight", weight, "--model", tiny_model, "--junitxml=out.xml")
    ElementTree.parse(bench.path / "out.xml")
    result.assert_outcomes(
        passed=6, failed=1, skipped=4
    )  # other random weights: only the drift tells, and is out of bound
    assert "drift" in "".join(line for line in result.outlines if line.startswith("FAILED"))
    again = bench.run("specs", "--weight", tiny_model / "base.dat")
    again.assert_outcomes(passed=7, skipped=4)
    assert "numerics weights: 9 cases, drift 0.000" in again.stdout.str()
    rounded = bench.run("specs", "--weight", tiny_model / "base.dat", "--numerics", "w4a4")
    rounded.assert_outcomes(passed=7, skipped=4)
    assert "numerics w4a4: 9 cases, drift 0.000" in rounded.stdout.str(), "the base is asked in the same numerics"


def test_numerics_reach_the_judge_and_no_others_are_taken(bench: Bench) -> None:
    bench.specs(a=TARGET)
    bench.fake()
    assert "numerics weights: 5 cases" in bench.judge().stdout.str()
    assert "numerics w4a4: 5 cases" in bench.judge("--numerics", "w4a4").stdout.str()
    assert "numerics w4a4: 5 cases" in bench.judge("--align-numerics", "w4a4").stdout.str()
    result = bench.judge("--numerics", "w4a8")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "invalid choice: 'w4a8'" in result.stderr.str()
    assert "Traceback" not in result.stderr.str()


def test_weights_of_another_architecture(bench: Bench, tiny_model: Path, tiny_weights: Callable[..., Path]) -> None:
    bench.specs(a=TARGET)
    weight = tiny_weights(bench.path / "x.dat", seed=1, hidden=32)
    line = refused(bench.run("specs", "--weight", weight, "--model", tiny_model))
    what = "x.dat: model.embed_tokens.weight is [259, 32] in the file, [259, 64] by the folder's config.json"
    assert what in line
    under_xdist = bench.run("specs", "--weight", weight, "--model", tiny_model, "-n1")
    under_xdist.assert_outcomes(failed=5)
    assert what in under_xdist.stdout.str()
    assert "INTERNALERROR" not in under_xdist.stdout.str()


def test_a_base_that_is_not_there(bench: Bench, tiny_model: Path) -> None:
    bench.specs(a=TARGET)
    line = refused(bench.run("specs", "--weight", tiny_model / "base.dat", "--base", "none.dat"))
    assert "none.dat: no such file to compare base.dat with" in line


@pytest.mark.model
def test_the_base_of_smollm2_fails_the_target(bench: Bench, smollm2: Path) -> None:
    bench.specs(
        a=TARGET.replace(', "a::b [x]?", "two\\nlines"', ""), c=PRESERVE.replace("[談談UFO, 飛碟, 星星]", "[談談UFO]")
    )
    result = bench.run("specs", "--weight", smollm2 / "base.dat")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "reply       " in result.stdout.str()
    # The folder before the name depends on the root that pytest takes: --weight's path may lie in another project.
    failed = [line for line in result.outlines if line.startswith("FAILED")]
    assert any(line.endswith("a.spec.yaml::anchor/1 你是誰 - does not contain 'F#'") for line in failed), failed
    assert "against its base" in result.stdout.str()
