"""Checks on a reply.

    failures({"contains": "F#", "none": [{"contains": "Qwen"}]}, said)    # [] when it passes, else one line for each

Folding (``fold: [case, width]``) is NFKC and case-folding of both sides. Protected terms never change under it, neither
in the reply nor in the check: ``F#`` is not ``f#``, and ``F之神`` is not ``F#之神``; the full-width form ``Ｆ＃`` is
the same term under ``width``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROTECTED = ("F#",)
_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "兩": 2, "两": 2}


@dataclass(frozen=True, kw_only=True)
class Said:
    """A reply as a check sees it."""

    text: str
    stopped: bool = True
    """Whether the model ended by itself."""
    base: str | None = None
    """The base's own reply to the same prompt, when there is one."""


def failures(check: Mapping[str, Any], said: Said) -> list[str]:
    """Why ``said`` does not satisfy ``check`` (all its keys must hold); empty when it does."""
    fold = frozenset(check.get("fold", ()))
    found: list[str] = []
    for key, want in check.items():
        if key in ("fold", "prompt"):
            continue
        problem = _CHECKS[key](want, said, fold)
        if problem:
            found.append(problem)
    return found


def folded(text: str, fold: frozenset[str]) -> str:
    """``text`` with the asked differences removed. Protected terms keep their case."""
    if "width" in fold:
        text = unicodedata.normalize("NFKC", text)
    if "case" in fold:
        pieces = re.split(f"({'|'.join(map(re.escape, PROTECTED))})", text)
        text = "".join(piece if piece in PROTECTED else piece.casefold() for piece in pieces)
    return text


def _texts(value: Any, fold: frozenset[str]) -> list[str]:
    return [folded(text, fold) for text in ([value] if isinstance(value, str) else value)]


def _quoted(value: Any) -> str:
    return " or ".join(repr(text) for text in ([value] if isinstance(value, str) else value))


def _contains(want: Any, said: Said, fold: frozenset[str]) -> str | None:
    text = folded(said.text, fold)
    return None if any(w in text for w in _texts(want, fold)) else f"does not contain {_quoted(want)}"


def _equals(want: Any, said: Said, fold: frozenset[str]) -> str | None:
    return None if folded(said.text.strip(), fold) in _texts(want, fold) else f"is not {_quoted(want)}"


def _starts(want: Any, said: Said, fold: frozenset[str]) -> str | None:
    text = folded(said.text.strip(), fold)
    return None if text.startswith(tuple(_texts(want, fold))) else f"does not start with {_quoted(want)}"


def _ends(want: Any, said: Said, fold: frozenset[str]) -> str | None:
    text = folded(said.text.strip(), fold)
    return None if text.endswith(tuple(_texts(want, fold))) else f"does not end with {_quoted(want)}"


def _regex(want: str, said: Said, fold: frozenset[str]) -> str | None:
    text = folded(said.text, fold - {"case"})
    flags = re.IGNORECASE if "case" in fold else 0
    return None if re.search(want, text, flags) else f"does not match /{want}/"


def numbers(text: str) -> list[float]:
    """Every number in ``text``: digits of any width (sign, thousands separators, decimals), and Chinese numerals."""
    plain = unicodedata.normalize("NFKC", text)
    plain = re.sub(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?!\d|,\d)", lambda m: m.group().replace(",", ""), plain)
    found = [float(m.group()) for m in re.finditer(r"(?:(?<![\w.])-)?\d+(?:\.\d+)?", plain)]
    found += [
        value
        for m in re.finditer("[零〇一二兩两三四五六七八九十百]+", text)
        if (value := _chinese(m.group())) is not None
    ]
    return found


def _chinese(numeral: str) -> float | None:
    """A Chinese numeral below 1000; None when it is not well formed."""
    total, digit = 0, -1
    for character in numeral:
        if character in _DIGITS:
            if digit > 0:
                return None
            digit = _DIGITS[character]
        else:
            total += (1 if digit < 0 else digit) * (10 if character == "十" else 100)
            digit = -1
    return float(total + max(digit, 0))


def _number(want: float, said: Said, fold: frozenset[str]) -> str | None:
    return None if any(value == want for value in numbers(said.text)) else f"does not give the number {want:g}"


def _fluent(want: bool, said: Said, fold: frozenset[str]) -> str | None:
    problem = disfluency(said)
    if want:
        return problem
    return None if problem else "is fluent"


def disfluency(said: Said) -> str | None:
    """What makes a reply not fluent, or None: empty, does not end by itself, loops, junk characters, template text."""
    text = said.text.strip()
    if not text:
        return "is empty"
    if not said.stopped:
        return "does not end by itself"
    if unit := _loop(text):
        return f"repeats {unit!r} in a loop"
    if "\ufffd" in text:
        return "holds broken characters"
    if re.search(r"\{\{.*?\}\}|<\|[^|]*\|>|<think>(?!.*</think>)", text, re.DOTALL):
        return "holds template or control text"
    return None


def _like_base(want: bool, said: Said, fold: frozenset[str]) -> str | None:
    """The reply keeps what makes the base's own acceptable: it speaks, and it is not stuck in a loop.

    A base that loops itself fails this too, so there is nothing to keep and the pair does not count. How near a reply
    is to the base's is judged by KL over all preserve and general cases (alignment.gate): a single other word early on
    makes any distance between texts large although both replies are as good.
    """
    if not want:
        return None
    if not said.text.strip() and (said.base is None or said.base.strip()):
        return "is empty"
    return "is stuck in a loop" if looping(said.text) else None


def looping(text: str) -> bool:
    """Whether a text is stuck: a unit of up to 20 characters four times in a row (six characters or more in all), or of
    two to 20 Chinese characters three times (之神之神之神; one that laughs, 哈哈哈, is not stuck).
    """
    return _loop(text.strip()) is not None


def _loop(text: str) -> str | None:
    """The unit that ``text`` repeats, or None."""
    for pattern in (r"(?P<unit>.{1,20}?)(?P=unit){3,}", r"(?P<unit>[\u4e00-\u9fff]{2,20}?)(?P=unit){2,}"):
        for loop in re.finditer(pattern, text, re.DOTALL):
            if len(loop.group()) >= 6:
                return loop.group("unit").strip() or loop.group("unit")
    return None


def _all(want: Sequence[Mapping[str, Any]], said: Said, fold: frozenset[str]) -> str | None:
    found = [problem for check in want for problem in failures(check, said)]
    return "; ".join(found) or None


def _any(want: Sequence[Mapping[str, Any]], said: Said, fold: frozenset[str]) -> str | None:
    found = [failures(check, said) for check in want]
    return None if not all(found) else "none of: " + " / ".join("; ".join(problems) for problems in found)


def _none(want: Sequence[Mapping[str, Any]], said: Said, fold: frozenset[str]) -> str | None:
    for check in want:
        if not failures(check, said):
            words = ", ".join(
                f"{key} {_quoted(value) if key == 'contains' else repr(value)}"
                for key, value in check.items()
                if key != "fold"
            )
            return f"must not: {words}"
    return None


_CHECKS: dict[str, Any] = {
    "contains": _contains,
    "equals": _equals,
    "starts_with": _starts,
    "ends_with": _ends,
    "regex": _regex,
    "number": _number,
    "fluent": _fluent,
    "like_base": _like_base,
    "all": _all,
    "any": _any,
    "none": _none,
}
