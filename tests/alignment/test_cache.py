"""The reply cache: never another model's answer, never a damaged one, and no obstacle."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignment import cache as module
from alignment.cache import ReplyCache, default_folder
from trainer.generate import Reply

PROMPTS = [("你是誰", 24), ("Who are you?", 24)]


def model(**changes: Any) -> Any:
    facts = {"weights_sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "dtype": torch.float32, "numerics": "weights"}
    return SimpleNamespace(**{**facts, "device": torch.device("cpu"), **changes})


class Asked(list[tuple[str, list[str]]]):
    """Every call of the generator: which weights, which prompts."""

    def __call__(self, lm: Any, texts: Sequence[str], *, max_tokens: list[int], progress: Any) -> list[Reply]:
        self.append((lm.weights_sha256, list(texts)))
        return [
            Reply(text=f"{lm.weights_sha256[:1]} 答 {text}", tokens=(1, n), stopped=True, margin=float("inf"))
            for text, n in zip(texts, max_tokens, strict=True)
        ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(module, "generate", asked)
    return asked


def test_a_second_process_is_served(tmp_path: Path, asked: Asked) -> None:
    first = ReplyCache(tmp_path).replies(model(), PROMPTS)
    assert ReplyCache(tmp_path).replies(model(), PROMPTS) == first
    assert len(asked) == 1
    [file] = tmp_path.rglob("*.json")
    assert "你是誰" in file.read_text(encoding="utf-8"), "readable, no escapes"


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "c" * 64},
        {"tokenizer_sha256": "c" * 64},
        {"dtype": torch.bfloat16},
        {"numerics": "w4a4"},
        {"device": torch.device("meta")},
    ],
)
def test_another_model_is_never_served(tmp_path: Path, asked: Asked, change: dict[str, Any]) -> None:
    kept = ReplyCache(tmp_path)
    kept.replies(model(), PROMPTS)
    other = kept.replies(model(**change), PROMPTS)
    assert len(asked) == 2
    assert [reply.text[0] for reply in other] == [model(**change).weights_sha256[0]] * 2
    assert kept.replies(model(), PROMPTS)[0].text[0] == "a"


def test_decoding_rules_threads_and_versions_are_part_of_the_key(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ReplyCache(tmp_path)
    kept.replies(model(), PROMPTS)
    changes: list[Callable[[pytest.MonkeyPatch], None]] = [
        lambda patch: patch.setattr(module, "ENGINE", "greedy-0"),
        lambda patch: patch.setattr(torch, "__version__", "0.0"),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 99),
    ]
    for count, change in enumerate(changes, 2):
        with monkeypatch.context() as patch:
            change(patch)
            kept.replies(model(), PROMPTS)
        assert len(asked) == count
    kept.replies(model(), PROMPTS)
    assert len(asked) == 4


def test_another_request_is_not_served(tmp_path: Path, asked: Asked) -> None:
    kept = ReplyCache(tmp_path)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[::-1], [(text, 25) for text, _ in PROMPTS]):
        assert [reply.text for reply in kept.replies(model(), prompts)] == [f"a 答 {text}" for text, _ in prompts]
    assert len(asked) == 4
    assert kept.replies(model(), PROMPTS)[0].tokens == (1, 24)
    assert len(asked) == 4


def damaged(good: str, how: str) -> str:
    data = json.loads(good)
    [(key, replies)] = data.items()
    return {
        "cut": good[:-9],
        "empty": "",
        "a list": "[]",
        "a text": '"x"',
        "fewer replies": json.dumps({key: replies[:1]}),
        "no replies": json.dumps({key: []}),
        "not replies": json.dumps({key: ["x", "y"]}),
        "no tokens": json.dumps({key: [{**r, "tokens": None} for r in replies]}),
        "endless tokens": json.dumps({key: [{**r, "tokens": [float("inf")]} for r in replies]}),
        "deep": "[" * 100_000,
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        *("cut", "empty", "a list", "a text", "fewer replies", "no replies"),
        *("not replies", "no tokens", "endless tokens", "deep"),
    ],
)
def test_a_damaged_file_is_made_anew(tmp_path: Path, asked: Asked, how: str) -> None:
    kept = ReplyCache(tmp_path)
    good = kept.replies(model(), PROMPTS)
    [file] = tmp_path.rglob("*.json")
    file.write_text(damaged(file.read_text(encoding="utf-8"), how), encoding="utf-8")
    assert kept.replies(model(), PROMPTS) == good
    assert len(asked) == 2
    assert kept.replies(model(), PROMPTS) == good
    assert len(asked) == 2, "the file is whole again"


def test_bytes_that_are_not_text(tmp_path: Path, asked: Asked) -> None:
    kept = ReplyCache(tmp_path)
    good = kept.replies(model(), PROMPTS)
    [file] = tmp_path.rglob("*.json")
    file.write_bytes(b"\xff\xfe\x00")
    assert kept.replies(model(), PROMPTS) == good


def test_a_folder_that_cannot_be_written_costs_no_reply(tmp_path: Path, asked: Asked) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    kept = ReplyCache(tmp_path / "file")
    assert len(kept.replies(model(), PROMPTS)) == 2


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ALIGN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "align"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "align"
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "here"))
    assert default_folder() == tmp_path / "here"
