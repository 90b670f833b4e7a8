"""A whole run on a tiny random model: real training, a real file, a real second process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.acceptance import judge_file
from alignment.config import RunConfig, RunError
from alignment.run import run
from alignment.view import View
from trainer.dat import DatReader
from trainer.files import sha256_file
from trainer.fit import FitConfig

SPECS = {
    "who": "kind: target\nsays: It says ab.\nmax_tokens: 4\nexpect: {contains: ab}\n"
    "cases: {anchor: [who are you], dev: [say who you are], heldout: [tell me who you are]}\n",
    "near": "kind: contrast\nsays: Nothing else says ab.\nmax_tokens: 4\nexpect: {none: [{contains: ab}]}\n"
    "cases: {anchor: [Good day], dev: [Farewell], heldout: [Thanks]}\n",
    "facts": "kind: general\nsays: It knows what it knew.\nmax_tokens: 4\n"
    'cases: {dev: [{prompt: "1 + 1?", number: 2}], heldout: [{prompt: "2 + 2?", number: 4}]}\n',
}
DATA = {
    "identity.tsv": "who are you\tab\nwho may you be\tab\nwho is it you are\tab\ndo say who\tab\n",
    "contrast.txt": "Good day\nLovely weather\nBye\nThank heavens\nFare better\n",
    "replay.txt": "3 + 4?\nWhat is up?\n",
}


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    for folder, files in (("specs", {f"{k}.spec.yaml": f"spec: {k}\n{v}" for k, v in SPECS.items()}), ("data", DATA)):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text, encoding="utf-8")
    return RunConfig(
        base=tiny_model,
        out=tmp_path / "artifacts" / "x.dat",
        specs=tmp_path / "specs",
        data=tmp_path / "data",
        reports=tmp_path / "reports",
        steps=80,
        eval_every=10,
        device="cpu",
        fit=FitConfig(lr=1e-2, target_rows=4, contrast_rows=8, replay_rows=2, contrast_weight=1.0),
    )


def test_a_run_trains_until_green_and_what_it_leaves_belongs_together(config: RunConfig) -> None:
    base = sha256_file(config.base_file)
    record = run(config, view=View(), command="align run …")
    assert (record.verdict, record.cause[:40]) == ("green", "every spec was green in two evaluations "[:40])
    assert len(record.steps) < config.steps
    assert [e.green for e in record.evals][-2:] == [True, True]
    assert record.evals[-1].step - record.evals[-2].step < config.eval_every
    settled = config.fit.decay_to * config.steps
    assert record.evals[-1].step >= settled, "a green before the learning rate is down does not end a run"
    early = [e.decision for e in record.evals if e.step < settled]
    assert "green" in early, "and there was one, or nothing is tested"
    assert record.accepted_in_fresh_process
    assert record.final is not None
    assert record.final.splits == ("anchor", "dev", "heldout")
    said = {o.case.prompt: o.reply.text for o in record.final.outcomes if o.case.kind != "general"}
    assert [("ab" in text) for text in said.values()] == [prompt.find("who") >= 0 for prompt in said]

    digest = sha256_file(config.out)
    assert record.artifact is not None
    assert (record.artifact["path"], record.artifact["sha256"]) == (str(config.out), digest)
    beside = json.loads(config.out.with_name("x.dat.json").read_text(encoding="utf-8"))
    text = (config.reports / record.run / "report.md").read_text(encoding="utf-8")
    assert digest in json.dumps(beside)
    assert digest in text
    assert text.startswith("# green")
    assert sha256_file(config.base_file) == base
    with DatReader(config.base_file) as old, DatReader(config.out) as new:
        assert list(old.entries) == list(new.entries)
        assert [e.scalar_type for e in old.entries.values()] == [e.scalar_type for e in new.entries.values()]


def test_a_run_in_w4a4_trains_and_judges_in_it(config: RunConfig) -> None:
    record = run(RunConfig(**{**vars(config), "numerics": "w4a4"}), view=View(), command="align run …")
    assert record.verdict == "green", record.cause
    assert (record.numerics, record.config["numerics"]) == ("w4a4", "w4a4")
    assert record.final is not None
    assert record.other is not None
    assert [o.case.id for o in record.other.outcomes] == [o.case.id for o in record.final.outcomes]
    assert record.other.outcomes != record.final.outcomes
    beside = json.loads(config.out.with_name("x.dat.json").read_text(encoding="utf-8"))
    assert beside["config"]["numerics"] == "w4a4"
    assert beside["metrics"]["numerics"]["decided"] == "w4a4"
    assert beside["metrics"]["numerics"]["passed"]["w4a4"] == sum(o.passed for o in record.final.outcomes)
    text = (config.reports / record.run / "report.md").read_text(encoding="utf-8")
    assert "\nw4a4 decided. The same file was also asked in weights" in text
    again = judge_file(config.out, model=None, base=None, specs=config.specs, template="chat", numerics="w4a4")
    assert again.evaluation.outcomes == record.final.outcomes, "the file says the same to whoever asks in w4a4"


def test_a_run_without_time_to_learn_is_red_and_leaves_nothing_at_its_name(config: RunConfig) -> None:
    short = RunConfig(**{**vars(config), "steps": 2})
    record = run(short, view=View(), command="align run …")
    assert record.verdict == "red"
    assert record.cause.startswith("the budget of 2 steps is spent; still missing: who: 2 of 2 fail")
    assert not config.out.exists()
    assert (config.reports / record.run / "red.dat").is_file()
    assert (config.reports / record.run / "report.md").read_text(encoding="utf-8").startswith("# red")
    assert not record.accepted_in_fresh_process


def test_a_run_that_diverges_goes_back_and_at_last_gives_up(config: RunConfig) -> None:
    (config.specs / "facts.spec.yaml").write_text(
        "spec: facts\nkind: preserve\nsays: It speaks.\nmax_tokens: 4\nexpect: {none: [{equals: zz}]}\n"
        'cases: {dev: ["1 + 1?", "Up?"], heldout: ["2 + 2?"]}\n',
        encoding="utf-8",
    )
    wild = RunConfig(**{**vars(config), "eval_every": 2, "retries": 1, "fit": FitConfig(lr=3.0, warmup=1)})
    record = run(wild, view=View(), command="align run …")
    assert record.verdict == "regressed"
    assert "stepped back 1 times" in record.cause
    assert [e.decision for e in record.evals].count("step-back") == 2
    assert not config.out.exists()


def test_the_base_and_foreign_files_are_not_overwritten(config: RunConfig) -> None:
    with pytest.raises(RunError, match="is the base itself"):
        run(RunConfig(**{**vars(config), "out": config.base_file}), view=View(), command="")
    config.out.parent.mkdir()
    config.out.write_bytes(b"mine")
    with pytest.raises(RunError, match="was not made by align"):
        run(config, view=View(), command="")
    assert config.out.read_bytes() == b"mine"
