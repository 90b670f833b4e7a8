"""One file judged, in this process and in a fresh one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import acceptance
from alignment.acceptance import Acceptance, judge_file, main, one_line, pick_device
from alignment.gate import assess
from alignment.suite import collect
from trainer.model import ModelError

SPEC = """\
spec: facts
kind: {kind}
says: x
max_tokens: 6
expect: {{none: [{{contains: no such text}}]}}
cases:
  anchor: [q1, q2]
  heldout: [q3]
"""


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "specs"
    folder.mkdir()
    (folder / "a.spec.yaml").write_text(SPEC.format(kind="preserve"), encoding="utf-8")
    return folder


def test_the_base_is_as_good_as_itself(tiny_model: Path, specs: Path) -> None:
    seen = []
    found = judge_file(
        tiny_model / "base.dat",
        model=None,
        base=None,
        specs=specs,
        template="runner",
        progress=lambda *now: seen.append(now),
    )
    assert found.assessment.green
    assert found.weight_sha256 == found.base_sha256
    assert found.evaluation.drift == pytest.approx(0, abs=1e-6)
    assert [o.case.prompt for o in found.evaluation.outcomes] == ["q1", "q2", "q3"]
    assert seen == [("base", 3, 3)], "the weight is the base: its replies are in the cache"


def test_a_fresh_process_answers_the_same(
    tiny_model: Path, tiny_weights: Callable[..., Path], specs: Path, tmp_path: Path
) -> None:
    weight = tiny_weights(tmp_path / "x.dat", seed=1)
    here = judge_file(weight, model=tiny_model, base=None, specs=specs, template="chat", drift_bound=99.0, alone=True)
    assert here.evaluation.drift > 1
    assert here.assessment.green, "99 nats are allowed"
    answer = tmp_path / "answer.json"
    code = main([str(weight), "--json", str(answer), "--model", str(tiny_model), "--specs", str(specs)])
    assert code == 0
    there = Acceptance.from_json(json.loads(answer.read_text(encoding="utf-8")), collect(specs))
    assert there.evaluation.outcomes == here.evaluation.outcomes
    assert not there.assessment.green
    assert there.assessment.reasons[-1].startswith("drift ")
    assert (there.weight_sha256, there.base_sha256) == (here.weight_sha256, here.base_sha256)
    assert Acceptance.from_json(json.loads(json.dumps(here.to_json())), collect(specs)) == here


def test_a_pass_that_flips_alone_is_unstable(tiny_model: Path, specs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (specs / "a.spec.yaml").write_text(SPEC.format(kind="contrast"), encoding="utf-8")
    real = acceptance.generate
    asked = []

    def alone(lm: object, texts: list[str], **more: object) -> object:
        asked.append(texts)
        [reply] = real(lm, texts, **more)  # type: ignore[arg-type]
        return [type(reply)(text="no such text", tokens=(), stopped=True, margin=0.0)]

    monkeypatch.setattr(acceptance, "generate", alone)
    monkeypatch.setattr(acceptance, "NARROW", {torch.float32: 99.0})
    facts = {"model": None, "base": None, "specs": specs, "template": "chat"}
    found = judge_file(tiny_model / "base.dat", **facts, alone=True)  # type: ignore[arg-type]
    assert [len(texts) for texts in asked] == [1, 1, 1]
    assert sorted(row["id"] for row in found.unstable) == [
        "facts/anchor/1 q1",
        "facts/anchor/2 q2",
        "facts/heldout/1 q3",
    ]
    assert {row["alone"] for row in found.unstable} == {"no such text"}
    monkeypatch.setattr(acceptance, "NARROW", {torch.float32: -1.0, torch.bfloat16: -1.0})
    assert judge_file(tiny_model / "base.dat", **facts, alone=True).unstable == []  # type: ignore[arg-type]


def test_wrong_input_is_one_line(tiny_model: Path, specs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = specs / "answer.json"
    assert (
        main([str(specs / "none.dat"), "--json", str(answer), "--model", str(tiny_model), "--specs", str(specs)]) == 2
    )
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{specs / 'none.dat'}: No such file or directory\n")
    assert not answer.exists()


def test_a_broken_base_is_told_by_its_own_name(
    tiny_model: Path, specs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (specs / "base.dat").write_bytes(b"\x82")
    arguments = ["--json", str(specs / "answer.json"), "--model", str(tiny_model), "--specs", str(specs)]
    assert main([str(tiny_model / "base.dat"), "--base", str(specs / "base.dat"), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"{specs / 'base.dat'}: byte 0: ")


def test_one_line() -> None:
    assert one_line(ValueError("a\nb  c"), Path("x.dat")) == "x.dat: a b c"
    assert one_line(ValueError("x.dat is odd"), Path("x.dat")) == "x.dat is odd"
    assert one_line(FileNotFoundError(2, "No such file", "y.dat"), Path("x.dat")) == "y.dat: No such file"


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="--device cuda: torch finds no CUDA device here; use auto or cpu"):
            pick_device("cuda")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_both_numerics_of_one_load(
    tiny_model: Path, tiny_weights: Callable[..., Path], specs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file asked in both is what two judgements in one each say, and the base is each time in the same numerics."""
    weight = tiny_weights(tmp_path / "x.dat", seed=1)
    facts: dict[str, Any] = {"model": tiny_model, "base": None, "specs": specs, "template": "chat"}
    loads = []
    real = acceptance.load

    def load(path: Path, **more: Any) -> Any:
        loads.append(path.name)
        return real(path, **more)

    monkeypatch.setattr(acceptance, "load", load)
    both = judge_file(weight, **facts, both=True)
    assert loads == ["base.dat", "x.dat"]
    apart = {name: judge_file(weight, **facts, numerics=name) for name in ("weights", "w4a4")}  # type: ignore[arg-type]
    assert both.other is not None
    assert both.evaluation.outcomes == apart["weights"].evaluation.outcomes
    assert both.other.outcomes == apart["w4a4"].evaluation.outcomes
    texts = [[o.base_reply.text for o in e.outcomes] for e in (both.evaluation, both.other)]
    assert texts[0] != texts[1], "the base was asked in the other numerics, too"
    assert (both.numerics, apart["w4a4"].numerics, apart["weights"].other) == ("weights", "w4a4", None)
    turned = judge_file(weight, **facts, numerics="w4a4", both=True)
    assert turned.evaluation.outcomes == both.other.outcomes
    assert turned.assessment == assess(both.other)
    assert Acceptance.from_json(json.loads(json.dumps(turned.to_json())), collect(specs)) == turned


def test_the_base_is_as_good_as_itself_in_both(tiny_model: Path, specs: Path) -> None:
    found = judge_file(tiny_model / "base.dat", model=None, base=None, specs=specs, template="chat", both=True)
    assert found.other is not None
    for evaluation in (found.evaluation, found.other):
        assert evaluation.drift == pytest.approx(0, abs=1e-6)
        assert not any(o.changed for o in evaluation.outcomes)
