"""Markdown that shows what a model said as text, never as Markdown, HTML or terminal commands.

    table(["Prompt"], [[escape(said)]], "l"), code(path), fenced(command, "sh")

Each takes text as it is; ``table`` and ``rows_as_they_are`` take cells that are escaped already.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from tabulate import tabulate

LIMIT = 400
"""Characters shown of a text unless said otherwise."""


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], align: str) -> list[str]:
    """A Markdown table of escaped cells and a blank line; ``align`` has one of l and r for each column."""
    if not rows:
        return ["None.", ""]
    sides = [{"l": "left", "r": "right"}[side] for side in align]
    # Left alone, tabulate would read "1e5" as a number and rewrite it.
    text = tabulate(rows, headers=headers, tablefmt="pipe", colalign=sides, disable_numparse=True)
    return [*text.split("\n"), ""]


def rows_as_they_are(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """As ``table``, of escaped cells without padding: one long reply would widen every row."""
    lines = [headers, ["---"] * len(headers), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


_MARKDOWN = {char: f"\\{char}" for char in "\\`*_[]~"} | {char: f"&#{ord(char)};" for char in "|$&<>"}


def escape(value: object, limit: int = LIMIT) -> str:
    """``value`` as inline Markdown (and table cell) that shows its characters and nothing else; long text is cut."""
    text = str(value)
    if not text.strip():
        return f"<em>(empty)</em> {visible(text[:limit]).replace(' ', '␠')}".rstrip()
    lines = text[:limit].replace("\r\n", "\n").split("\n")
    shown = "<br>".join("".join(_MARKDOWN.get(char, char) for char in visible(line)) for line in lines)
    shown = re.sub(r"(?<=[^\W_])\\_(?=[^\W_])", "_", shown)  # inside a word it marks nothing: lm_head stays readable
    # Bare addresses become links on GitHub without any markup.
    shown = re.sub(r"(?i)(www)\.", r"\1&#46;", shown.replace("://", "&#58;//"))
    return shown if len(text) <= limit else f"{shown}… <em>({len(text):,} characters, {limit} shown)</em>"


def visible(text: str) -> str:
    """``text`` with a harmless picture for every character that steers a terminal, a line or the reading direction."""
    hidden = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\u200d"}  # joins emoji
    names = {
        ord(c): f"⟨U+{ord(c):04X}⟩" if c > "\x7f" else "␡" if c == "\x7f" else chr(0x2400 + ord(c)) for c in hidden
    }
    return text.translate(names)


def code(value: object) -> str:
    """``value`` as a code span outside tables."""
    text = visible(str(value))
    return f"{_fence(text)} {text} {_fence(text)}" if "`" in text else f"`{text}`"


def fenced(text: str, language: str) -> list[str]:
    """``text`` as a code block, and a blank line."""
    fence = _fence(text, 3)
    return [f"{fence}{language}", *map(visible, text.split("\n")), fence, ""]


def _fence(text: str, least: int = 1) -> str:
    """Backticks that ``text`` cannot close."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
