"""Replies on a screen and in a file: readable, harmless, complete.

    harmless("\\x1b[2J你好")      # '\\\\x1b[2J你好'
    block(("prompt", "你是誰"), ("reply", "我是…"))

A reply is whatever a model said: it may hold terminal escapes, bidirectional overrides or half a character. None of
them reaches a terminal or an XML file as such; every other character stays as it is.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment.evaluate import Outcome
    from alignment.spec import Case

NAME_LENGTH = 80


def harmless(text: str) -> str:
    """``text`` with control, format, surrogate and line-separator characters (but newline) written as escapes."""
    return "".join(c if c == "\n" or not _acts(c) else _escape(c) for c in text)


def _acts(c: str) -> bool:
    # Cn is also every character newer than this Python's tables; of those only the non-characters are refused by XML.
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") or ord(c) & 0xFFFE == 0xFFFE


def _escape(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")


def block(*rows: tuple[str, str]) -> str:
    """Labelled texts under each other, the further lines of each below its first."""
    width = max(len(label) for label, _ in rows)
    lines: list[str] = []
    for label, text in rows:
        first, *more = (harmless(text) or "(empty)").split("\n")
        lines.append(f"{label:<{width}}  {first}".rstrip())
        lines += [f"{'':<{width}}  {line}".rstrip() for line in more]
    return "\n".join(lines)


def name_of(case: Case) -> str:
    """``split/number prompt`` on one line: the part of Case.id that follows the file in a test's id.

    Long prompts are cut and ``::`` is spread, because it separates the parts of a test's id; the number keeps names
    apart.
    """
    prompt = harmless(case.prompt.replace("\n", "\\n")).replace("::", ": :")
    cut = prompt if len(prompt) <= NAME_LENGTH else prompt[: NAME_LENGTH - 1] + "…"
    return f"{case.split}/{case.number} {cut}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What pytest's short summary and JUnit's message attribute read of a failure."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A failure report as pytest prints it: on the terminal, in the short summary and in JUnit XML."""

    headline: str
    """One line."""
    text: str

    @property
    def reprcrash(self) -> Headline:
        """The name under which pytest looks for the one line."""
        return Headline(message=self.headline)

    def toterminal(self, out: Any) -> None:
        """Write the report to pytest's terminal writer."""
        out.line(self.text)

    def __str__(self) -> str:
        return self.text


class SpecFailedError(Exception):
    """A case, a paired test or the drift test that fails; ``shown`` is the whole report."""

    def __init__(self, shown: Shown) -> None:
        super().__init__(shown.headline)
        self.shown = shown


def shown(outcome: Outcome) -> Shown:
    """Prompt, reply, base reply and every failed check."""
    case, reply, base = outcome.case, outcome.reply, outcome.base_reply
    text = block(
        ("prompt", case.prompt),
        ("reply", reply.text + ("" if reply.stopped else f" … (cut at {case.max_tokens} tokens)")),
        ("base reply", base.text + ("" if base.stopped else f" … (cut at {case.max_tokens} tokens)")),
        *((("failed", "\n".join(outcome.problems)),) if outcome.problems else ()),
    )
    return Shown(headline=harmless("; ".join(outcome.problems)), text=text)
