"""The tokenizer of a model folder as GGUF fields.

GGUF does not store how text is split before merging: it names one of llama.cpp's built-in splitters. So only a
byte-level BPE whose ``tokenizer.json`` splits exactly as one of them can be exported; another would give other tokens
without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.transfer import TransferError, read_json

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = _WORDS + r"\p{N}" + _REST
LLAMA3_PATTERN = _WORDS + r"\p{N}{1,3}" + _REST
_SPLITS = {QWEN2_PATTERN: "qwen2", LLAMA3_PATTERN: "llama-bpe"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's token types."""


def splitter(path: Path, plain: Any) -> str:
    """llama.cpp's name of the way in which ``plain``, the content of the tokenizer.json at ``path``, splits text.

    Raises TransferError for a tokenizer that is not byte-level BPE or splits in a way without a name.
    """
    model = plain.get("model") if isinstance(plain, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise TransferError(f"{path}: only byte-level BPE tokenizers can be exported as GGUF")
    if (plain.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        raise TransferError(f"{path}: normalizer {plain['normalizer'].get('type')} has no counterpart in GGUF")
    before = plain.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        own = bool(last.get("use_regex", True))
        first = steps[0]
        if len(steps) == 1 and own:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own and first.get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own and _isolates(first):
            name = _SPLITS.get(str((first.get("pattern") or {}).get("Regex")))
            if name:
                return name
    raise TransferError(
        f"{path}: text is split in a way that has no name in GGUF ({', '.join(map(str, kinds))}); "
        f"known are those of gpt-2, smollm, qwen2 and llama-bpe"
    )


def _isolates(step: dict[str, Any]) -> bool:
    return step.get("behavior") == "Isolated" and not step.get("invert")


def tokens(path: Path, plain: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """(token, GGUF type) of each of ``size`` ids; an id without a token is an unused one. Raises TransferError."""
    texts: list[str | None] = [None] * size
    types = [UNUSED] * size
    added = {row["content"]: row for row in plain.get("added_tokens") or []}
    named = {**plain["model"]["vocab"], **{content: row["id"] for content, row in added.items()}}
    for text, index in named.items():
        if index >= size:
            raise TransferError(f"{path}: token {text!r} has id {index}, config.json has {size} ids")
        texts[index] = text
        types[index] = NORMAL if text not in added else CONTROL if added[text].get("special") else USER_DEFINED
    return [f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)], types


def add_tokenizer(writer: Any, folder: Path, tokenizer: Any, size: int) -> None:
    """Give a ``gguf.GGUFWriter`` the tokenizer of ``folder``, also loaded as ``tokenizer``. Raises TransferError."""
    path = folder / "tokenizer.json"
    plain = read_json(path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(path, plain))
    texts, types = tokens(path, plain, size)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in plain["model"].get("merges") or []]
    )
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(int(index))
    probe = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
