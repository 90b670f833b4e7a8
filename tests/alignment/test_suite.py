"""A folder of specs, and the training data that must not hold its questions."""

from pathlib import Path

import pytest

from alignment.spec import SpecError
from alignment.suite import LeakError, collect, leaks, overlap, refuse_leaks

ONE = "spec: {name}\nkind: preserve\nsays: x\ncases:\n  anchor: [{anchor}]\n  dev: [{dev}]\n"


def folder(tmp_path: Path, **specs: tuple[str, str]) -> Path:
    for name, (anchor, dev) in specs.items():
        text = ONE.format(name=name, anchor=anchor, dev=dev)
        (tmp_path / f"{name}.spec.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def test_collecting(tmp_path: Path) -> None:
    suite = collect(folder(tmp_path, b=("甲", "乙"), a=("丙", "丁")))
    assert [spec.name for spec in suite.specs] == ["a", "b"]
    assert [case.prompt for case in suite.cases] == ["丙", "丁", "甲", "乙"]
    assert [case.prompt for case in suite.select("dev", "heldout")] == ["丁", "乙"]
    assert suite.kinds() == {"a": "preserve", "b": "preserve"}


def test_the_hash_is_of_names_and_bytes(tmp_path: Path) -> None:
    first = collect(folder(tmp_path, a=("丙", "丁"))).sha256
    assert collect(tmp_path).sha256 == first
    path = tmp_path / "a.spec.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "# a comment\n", encoding="utf-8")
    second = collect(tmp_path).sha256
    path.rename(tmp_path / "c.spec.yaml")
    assert len({first, second, collect(tmp_path).sha256}) == 3


def test_what_a_suite_refuses(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no \*\.spec\.yaml file in it"):
        collect(tmp_path)
    folder(tmp_path, a=("丙", "丁"), b=("戊", "丙"))
    with pytest.raises(SpecError, match="the prompt '丙' stands twice: 'a/anchor/1 丙' and 'b/dev/1 丙'"):
        collect(tmp_path)
    (tmp_path / "b.spec.yaml").write_text(ONE.format(name="a", anchor="戊", dev="己"), encoding="utf-8")
    with pytest.raises(SpecError, match="the name 'a' is used by 2 files"):
        collect(tmp_path)


@pytest.mark.parametrize(
    ("case", "row"),
    [
        ("你是誰", "你是誰"),
        ("你是誰", "你是誰？"),
        ("你是誰", " 你是誰！\n"),
        ("UFO", "ｕｆｏ"),
        ("可以告訴我你是誰嗎", "可以告訴我你是誰嗎？拜託"),
        ("你好", "你好。"),
        ("Who are you?", "who are you"),
        ("May I ask who you are?", "May I ask who you are, please?"),
    ],
)
def test_nearly_the_same_question_is_a_leak(tmp_path: Path, case: str, row: str) -> None:
    suite = collect(folder(tmp_path, a=("無關的問題", f'"{case}"')))
    assert leaks(suite.cases, {"rows.tsv": ["完全不同", row]}) != []
    with pytest.raises(LeakError, match=r"1 dev or held-out prompt\(s\) stand in the training data: .*rows.tsv"):
        refuse_leaks(suite, {"rows.tsv": [row]})


@pytest.mark.parametrize(
    ("case", "row"),
    [
        ("你是誰", "我是誰"),
        ("你是誰", "他是誰"),
        ("你好", "你是誰"),
        ("Who is he?", "Who is she?"),
        ("C# 好嗎", "F# 好嗎"),
    ],
)
def test_a_near_miss_is_no_leak(tmp_path: Path, case: str, row: str) -> None:
    refuse_leaks(collect(folder(tmp_path, a=("無關的問題", f'"{case}"'))), {"rows.tsv": [row]})


def test_anchors_may_be_trained_on(tmp_path: Path) -> None:
    refuse_leaks(collect(folder(tmp_path, a=("你是誰", "無關的問題"))), {"rows.tsv": ["你是誰"]})


def test_overlap() -> None:
    assert overlap("你是誰", "你是誰？！") == 1.0
    assert overlap("你是誰", "我在哪") == 0.0
    assert overlap("你是誰啊", "你是誰") == 0.5
    assert overlap("？？", "！") == 1.0
