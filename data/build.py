"""Write identity.tsv and contrast.txt beside this file from templates.yaml: python data/build.py

Every core appears plain and with openers and endings; openers and endings are shared by the identity and its near
misses. A generated row that overlaps a dev or held-out prompt of specs/ is left out, so that the build cannot leak.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import yaml

from alignment.suite import LEAK_BOUND, bare, collect, overlap, refuse_leaks

HERE = Path(__file__).parent
SUITE = collect(HERE.parent / "specs")
HIDDEN = [case.prompt for case in SUITE.select("dev", "heldout")]


def near(prompt: str) -> bool:
    """Whether ``prompt`` nearly equals a dev or held-out prompt or holds one whole."""
    text = bare(prompt)
    return any(bare(hidden) in text or overlap(prompt, hidden) >= LEAK_BOUND for hidden in HIDDEN)


def variants(core: str, language: str, spec: dict[str, Any], random: Random, turn: int) -> list[str]:
    """``core`` once plain, then decorated, then plain again; ``turn`` moves the openers on, so that none is rare."""
    asked, text = core[-1] in "?？", core.rstrip("?？")
    kind = ("closed" if text.endswith(tuple(spec["closed"][language])) else "open") if asked else "said"
    openers = spec["decorations"][language]["openers"]["question" if asked else "said"]
    endings = spec["decorations"][language]["endings"][kind]
    count = len(openers)
    pairs = [(openers[(turn + 5 * step) % count], random.choice(endings)) for step in range(2 * count)]
    plain = [("", ending) for ending in endings]
    random.shuffle(plain)
    pairs = [plain[0], *pairs, *plain[1:]]
    made = []
    for opener, ending in pairs:
        row = f"{opener}{text}{ending}"
        if language == "en":
            row = row.lower() if random.random() < 0.3 else row[0].upper() + row[1:]
        made.append(row)
    return list(dict.fromkeys(made))


def draw(cores: list[str], count: int, language: str, spec: dict[str, Any], taken: set[str], name: str) -> list[str]:
    """``count`` rows from ``cores`` in turn, so that all appear about equally often. Adds them to ``taken``."""
    random = Random(f"{spec['seed']} {name} {language}")
    order = [*cores]
    random.shuffle(order)
    order.sort(key=lambda core: core[-1] in "?？")
    queues = {core: variants(core, language, spec, random, turn) for turn, core in enumerate(order)}
    rows: list[str] = []
    uses: Counter[str] = Counter()
    while len(rows) < count:
        before = len(rows)
        for core in order:
            while len(rows) < count and queues[core]:
                row = queues[core].pop(0)
                if row.casefold() not in taken and not near(row):
                    rows.append(row)
                    taken.add(row.casefold())
                    uses[core] += 1
                    break
        if len(rows) == before:
            raise SystemExit(f"{name} {language}: {len(rows)} rows of {count}; add cores or decorations")
    if few := [core for core in cores if uses[core] < 2]:
        raise SystemExit(f"{name} {language}: too near to dev or held-out prompts, or too many cores: {few}")
    return rows


def build(spec: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """The rows of identity.tsv and of contrast.txt."""
    cores = {
        side: {lang: text.splitlines() for lang, text in spec[side].items()} for side in ("identity", *spec["parts"])
    }
    fixed = {side: {lang: text.splitlines() for lang, text in spec["verbatim"][side].items()} for side in spec["rows"]}
    taken = {row.casefold() for side in fixed.values() for rows in side.values() for row in rows}
    identity: list[tuple[str, str]] = []
    contrast: list[str] = []
    for lang, target in spec["targets"].items():
        kept = fixed["identity"][lang]
        rows = draw(cores["identity"][lang], spec["rows"]["identity"] - len(kept), lang, spec, taken, "identity")
        identity += [(row, target) for row in (*kept, *rows)]
    for lang in spec["targets"]:
        kept = fixed["contrast"][lang]
        room = spec["rows"]["contrast"] - len(kept)
        contrast += kept
        for part, share in spec["parts"].items():
            count = round(room * share / sum(spec["parts"].values()))
            contrast += draw(cores[part][lang], count, lang, spec, taken, part)
    return identity, contrast


def main() -> None:
    """Build, check and write both files."""
    identity, contrast = build(yaml.safe_load((HERE / "templates.yaml").read_text(encoding="utf-8")))
    prompts = {"identity.tsv": [prompt for prompt, _ in identity], "contrast.txt": contrast}
    refuse_leaks(SUITE, prompts)
    if both := {*map(bare, prompts["identity.tsv"])} & {*map(bare, contrast)}:
        raise SystemExit(f"in both files: {sorted(both)}")
    lines = ["prompt\ttarget", *("\t".join(row) for row in identity)]
    (HERE / "identity.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    (HERE / "contrast.txt").write_text("\n".join(contrast) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
