"""A spec file: what loads, and which line of which file a refusal names."""

from pathlib import Path

import pytest

from alignment.spec import SpecError, load, schema

GOOD = """\
spec: who
kind: target
says: It says who it is.
max_tokens: 12
expect: {contains: "F#"}
cases:
  anchor: [你是誰, {prompt: Who, starts_with: I}]
  heldout: [報上名來]
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "who.spec.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(tmp_path: Path, text: str | bytes) -> str:
    path = write(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:"), message
    return message.removeprefix(str(path))


def test_a_good_file(tmp_path: Path) -> None:
    spec = load(write(tmp_path, GOOD))
    assert (spec.name, spec.kind, spec.says) == ("who", "target", "It says who it is.")
    assert [case.id for case in spec.cases] == ["who/anchor/1 你是誰", "who/anchor/2 Who", "who/heldout/1 報上名來"]
    assert spec.cases[0].expect == {"contains": "F#"}
    assert spec.cases[1].expect == {"all": [{"contains": "F#"}, {"starts_with": "I"}]}
    assert {case.max_tokens for case in spec.cases} == {12}
    assert len(set(spec.cases)) == 3, "cases are keys of the evaluator's tables"


def test_a_file_saved_by_a_windows_editor(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    assert load(write(tmp_path, text)).cases[0].prompt == "你是誰"


def test_the_suite_of_this_repository_loads() -> None:
    for path in sorted((Path(__file__).parents[2] / "specs").glob("*.spec.yaml")):
        assert load(path).cases


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("kind: target", "kinds: target", ":2: (top level): unknown key 'kinds'; did you mean 'kind'?"),
        ("kind: target", "kind: targets", ":2: kind: 'targets' is not one of target, contrast, preserve, general"),
        ("says: It says who it is.\n", "", ":1: (top level): missing key 'says'"),
        ("spec: who", "spec: Who Am I", ":1: spec: 'Who Am I' does not match"),
        ("max_tokens: 12", "max_tokens: 0", ":4: max_tokens: 0 is less than the minimum"),
        ('{contains: "F#"}', '{contain: "F#"}', ":5: expect: unknown key 'contain'; did you mean 'contains'?"),
        ('{contains: "F#"}', '{contains: ""}', ":5: expect.contains:"),
        ('{contains: "F#"}', "{fold: [cases]}", ":5: expect.fold.0: 'cases' is not one of case, width"),
        ("starts_with: I", "start_with: I", ":7: cases.anchor.1: unknown key 'start_with'; did you mean 'starts_with'"),
        ("heldout:", "held_out:", ":8: cases: unknown key 'held_out'; did you mean 'heldout'?"),
        ("[報上名來]", "[]", ":8: cases.heldout:"),
        ("[報上名來]", "[123]", ":8: cases.heldout.0: 123 is neither a text nor"),
    ],
)
def test_a_schema_error_names_line_key_and_remedy(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) == 1
    assert refusal(tmp_path, GOOD.replace(old, new)).startswith(expected)


def test_the_first_error_of_the_file_is_told(tmp_path: Path) -> None:
    many = "".join(f"    - {{prompt: p{i}, contains: x}}\n" for i in range(12))
    text = GOOD[: GOOD.index("cases:")] + "cases:\n  dev:\n" + many
    text = text.replace("p2, contains", "p2, contain").replace("p10, contains", "p10, contain")
    assert refusal(tmp_path, text).startswith(":10: cases.dev.2:")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            GOOD.replace("[報上名來]", "[報上名來"),
            ":9: not valid YAML: while parsing a flow sequence, expected ',' or ']'",
        ),
        (GOOD + "  heldout: [再問一次]\n", ":9: the key 'heldout' stands twice"),
        (GOOD.replace('"F#"', '"F#", contains: 神'), ":5: the key 'contains' stands twice"),
        (GOOD.encode().replace("誰".encode(), b"\xff"), ": not UTF-8 at byte"),
        (GOOD.replace("你是誰", r'"\ud83d\ude00"'), ":7: case '\\ud83d\\ude00' holds half a character"),
        ("", ":1: (top level): None is not of type 'object'"),
        ("[" * 5000, ": not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_spec(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert refusal(tmp_path, text).startswith(expected)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        load(tmp_path / "none.spec.yaml")


def test_a_case_with_nothing_to_check(tmp_path: Path) -> None:
    text = GOOD.replace('expect: {contains: "F#"}\n', "")
    assert refusal(tmp_path, text).startswith(":6: case '你是誰' has nothing to check")
    assert load(write(tmp_path, text.replace("kind: target", "kind: preserve"))).cases[0].expect == {}


def test_checks_that_the_schema_cannot_judge(tmp_path: Path) -> None:
    broken = refusal(tmp_path, GOOD.replace("starts_with: I", "none: [{regex: '(a'}]"))
    assert broken.startswith(":7: case 'Who': regex '(a' is not valid: missing )")
    assert "fold alone checks nothing" in refusal(tmp_path, GOOD.replace("starts_with: I", "fold: [case]"))


def test_an_alias_that_holds_itself_is_no_endless_loop(tmp_path: Path) -> None:
    assert refusal(tmp_path, "cases: &a {dev: *a}\n")


def test_the_schema_is_itself_valid() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(schema())
