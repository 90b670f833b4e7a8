"""Replies of unmodified files, kept between processes.

One JSON file holds the replies of one setting; its key is everything that decides a reply: hash of the weights, hash of
the tokenizer and template, numerics, arithmetic, device kind, decoding rules and library versions. The prompt is the
rendered text with its limit. A cache keyed by the request alone would serve one model's answers to another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from trainer.files import atomic_write
from trainer.generate import ENGINE, Reply, generate
from trainer.model import LanguageModel


def default_folder() -> Path:
    """``$ALIGN_CACHE``, else ``$XDG_CACHE_HOME/align``, else ``~/.cache/align``."""
    if chosen := os.environ.get("ALIGN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align"


class ReplyCache:
    """Greedy replies by setting and rendered prompt."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = (folder or default_folder()) / "replies"

    def _path(self, lm: LanguageModel) -> Path:
        setting = {
            "weights": lm.weights_sha256,
            "folder": lm.tokenizer_sha256,
            "numerics": lm.numerics,
            "dtype": str(lm.dtype),
            "device": torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type,
            "threads": torch.get_num_threads() if lm.device.type == "cpu" else 0,
            "engine": ENGINE,
            "torch": torch.__version__,
            "transformers": __import__("transformers").__version__,
        }
        return self._folder / f"{sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()}.json"

    def replies(
        self,
        lm: LanguageModel,
        prompts: Sequence[tuple[str, int]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Reply]:
        """The replies to (rendered text, max_tokens) pairs, in order; what is not kept yet is generated and kept.

        Replies depend in the last bit on the batch they were decoded in, so a request is served from the cache only
        when all of it was generated together: one record is one batch request.
        """
        request = sha256(json.dumps(list(map(list, prompts)), ensure_ascii=False).encode()).hexdigest()
        path = self._path(lm)
        kept = _read(path)
        if len(kept.get(request, ())) == len(prompts):
            return [_reply(item) for item in kept[request]]
        replies = generate(lm, [t for t, _ in prompts], max_tokens=[n for _, n in prompts], progress=progress)
        kept = _read(path)  # another process may have added to it meanwhile
        kept[request] = [
            {
                "text": r.text,
                "tokens": list(r.tokens),
                "stopped": r.stopped,
                "margin": r.margin,
                "margins": list(r.margins),
            }
            for r in replies
        ]
        with suppress(OSError):  # a cache that cannot be written costs time; it must not cost the replies
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as out:
                out.write(json.dumps(kept, ensure_ascii=False).encode())
        return replies


def _read(path: Path) -> dict[str, Any]:
    """The file's records; a damaged or foreign file counts as empty (it is rewritten whole)."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {key: value for key, value in kept.items() if all(_reply(item) for item in value)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _reply(item: dict[str, Any]) -> Reply:
    return Reply(
        text=str(item["text"]),
        tokens=tuple(int(token) for token in item["tokens"]),
        stopped=bool(item["stopped"]),
        margin=float(item["margin"]),
        margins=tuple(float(margin) for margin in item["margins"]),
    )
