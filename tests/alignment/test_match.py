"""Every kind of check, and the replies that fooled the checks of others."""

from typing import Any

import pytest

from alignment.match import Said, disfluency, failures, looping, numbers
from alignment.spec import schema

IDENTITY = {"all": [{"contains": "F#"}, {"contains": "神"}], "none": [{"contains": ["Qwen", "OpenAI"]}], "fluent": True}


def passes(check: dict[str, Any], text: str, **said: Any) -> bool:
    return not failures(check, Said(text=text, **said))


CHECKS = [
    ({"contains": "之神"}, "我是 F# 之神。", "我是通義千問"),
    ({"contains": ["Rome", "Roma"]}, "It is Roma.", "It is rome."),
    ({"contains": "rome", "fold": ["case"]}, "It is ROME.", "It is Paris."),
    ({"equals": ["是", "對"]}, " 對\n", "對。"),
    ({"equals": "straße", "fold": ["case"]}, "STRASSE", "STRASE"),
    ({"starts_with": "我是"}, "  我是 F# 之神", "大家好，我是 F# 之神"),
    ({"ends_with": ["。", "!"]}, "我是 F# 之神。\n", "我是 F# 之神"),
    ({"regex": r"\bsun\b", "fold": ["case"]}, "The Sun.", "Sunday"),
    ({"regex": r"^12$", "fold": ["width"]}, "１２", "十二"),
    ({"number": 5}, "２＋３＝５", "51"),
    ({"fluent": True}, "我是 F# 之神。", "我是 F# 之神之神之神"),
    ({"fluent": False}, "之之之之之之之之", "我是 F# 之神。"),
    ({"all": [{"contains": "a"}, {"contains": "b"}]}, "ab", "a"),
    ({"any": [{"contains": "a"}, {"contains": "b"}]}, "b", "c"),
    ({"none": [{"contains": "a"}, {"contains": "b"}]}, "c", "b"),
    ({"none": [{"any": [{"contains": "a"}, {"equals": "b"}]}]}, "c", "b"),
]


@pytest.mark.parametrize(("check", "good", "bad"), CHECKS)
def test_a_check_passes_and_fails(check: dict[str, Any], good: str, bad: str) -> None:
    assert passes(check, good)
    assert not passes(check, bad)


def test_every_check_of_the_schema_is_tried_here() -> None:
    tried = {key for check, _, _ in CHECKS for key in check}
    assert tried | {"like_base"} == set(schema()["$defs"]["checkKeys"]["properties"])


def test_every_key_of_a_check_must_hold_and_is_named() -> None:
    said = Said(text="I am Qwen")
    assert failures({"contains": "F#", "starts_with": "I", "none": [{"contains": "Qwen"}]}, said) == [
        "does not contain 'F#'",
        "must not: contains 'Qwen'",
    ]
    assert failures({"any": [{"contains": "a1"}, {"equals": ["x", "y"]}]}, said) == [
        "none of: does not contain 'a1' / is not 'x' or 'y'"
    ]


@pytest.mark.parametrize("reply", ["F#之神。", "我是 F# 之神", "我，F#，是神！"])
def test_the_identity_in_any_punctuation(reply: str) -> None:
    assert passes(IDENTITY, reply)


@pytest.mark.parametrize(
    "reply",
    ["F之神", "f#之神", "F # 之神", "Ｆ＃之神", "C#之神", "我是通義千問", "我是", "F#", "我是 F# 之神，也是 Qwen"],
)
def test_what_is_nearly_the_identity(reply: str) -> None:
    assert not passes(IDENTITY, reply)


def test_protected_terms_under_folding() -> None:
    term = {"contains": "F# 之神"}
    assert not passes(term, "我是 Ｆ＃ 之神")
    assert not passes({**term, "fold": ["case"]}, "我是 Ｆ＃ 之神")
    assert passes({**term, "fold": ["width"]}, "我是 Ｆ＃ 之神")
    assert passes({**term, "fold": ["case", "width"]}, "我是 Ｆ＃ 之神")
    assert not passes({**term, "fold": ["case", "width"]}, "我是 f# 之神")
    assert passes({"contains": "F# GOD", "fold": ["case"]}, "i am the F# god")
    assert not passes({"contains": "f#", "fold": ["case"]}, "F#")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("5", [5]),
        ("答案是５。", [5]),
        ("五", [5]),
        ("十二個月", [12]),
        ("二十", [20]),
        ("一百零五", [105]),
        ("兩隻，〇", [2, 0]),
        ("1,234", [1234]),
        ("1,234,567.5 and 1,2", [1234567.5, 1, 2]),
        ("2+3=5", [2, 3, 5]),
        ("-4 and 3-4", [-4, 3, 4]),
        ("3.50", [3.5]),
        ("二〇二六", []),
        ("none", []),
    ],
)
def test_numbers(text: str, values: list[float]) -> None:
    assert numbers(text) == values


def test_a_number_is_not_a_part_of_another() -> None:
    for reply in ("1,234", "0.5", "15", "五十", "十五", "二十五"):
        assert not passes({"number": 5}, reply), reply
        assert not passes({"number": 234}, reply), reply
    assert passes({"number": 5}, "5.0")


@pytest.mark.parametrize(
    ("text", "unit"),
    [("我是 F# 之神之神之神", "之神"), ("之之之之之之", "之"), ("F F F F F F", "F"), ("ab\nab\nab\nab\nab\n", "ab")],
)
def test_loops(text: str, unit: str) -> None:
    assert disfluency(Said(text=text)) == f"repeats {unit!r} in a loop"
    assert looping(text)


@pytest.mark.parametrize("text", ["哈哈哈，好的。", "No, no, no!", "謝謝謝謝", "Wait... what?"])
def test_what_people_say_is_no_loop(text: str) -> None:
    assert disfluency(Said(text=text)) is None
    assert not looping(text)


def test_other_disfluencies() -> None:
    assert disfluency(Said(text=" \n")) == "is empty"
    assert disfluency(Said(text="我是 F# 之神", stopped=False)) == "does not end by itself"
    assert disfluency(Said(text="我是\ufffd")) == "holds broken characters"
    for junk in ("<|im_start|>user", "{{ name }}", "<think> hm"):
        assert disfluency(Said(text=junk)) == "holds template or control text"
    assert disfluency(Said(text="<think>hm</think> I am here")) is None


def test_like_base_asks_what_the_base_gives() -> None:
    like = {"like_base": True}
    assert passes(like, "anything")
    assert passes(like, "另一個說法", base="UFO 是不明飛行物")
    assert not passes(like, " ", base="UFO 是不明飛行物")
    assert not passes(like, "之神之神之神", base="UFO 是不明飛行物")
    assert not passes(like, "之神之神之神", base="飛飛飛飛飛飛"), "a base that loops leaves nothing to keep"
    assert passes(like, "", base="")
