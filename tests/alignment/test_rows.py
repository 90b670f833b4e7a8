"""What contrast rows are held along, and when the learning rate falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignment.rows import ANCHOR_SHARE, UNLIKELY, DataFolder, _shared_tail, _temptations, _with_anchor_share
from trainer.fit import Fit, FitConfig
from trainer.model import load


@pytest.mark.parametrize(
    ("prompt", "tail"),
    [
        ("F# 難學嗎？", "F# 之神。"),
        ("Is F# hard?", "F# 之神。"),
        ("我是誰", ""),
        ("神是什麼", ""),
        ("誰是之神", "之神。"),
    ],
)
def test_a_prompt_is_held_along_what_it_shares_with_the_name(prompt: str, tail: str) -> None:
    assert _shared_tail(prompt, "F# 之神。") == tail


def test_a_temptation_ends_with_the_first_token_that_the_base_would_not_say(tiny_model: Path) -> None:
    lm = load(tiny_model / "base.dat", dtype=torch.float32)
    data = DataFolder(
        targets=(("who are you", "abcdef"),), contrast=("who am i",), replay=("up",), by_file={}, hashes={}
    )
    [(target, opening)] = _temptations(lm, data, "chat").items()
    ids = lm.encode(lm.render("who are you"))
    tokens = lm.encode(target)
    with torch.no_grad():
        logits = lm.module(input_ids=torch.tensor([ids + tokens])).logits[0].softmax(-1)
    likely = [float(logits[len(ids) - 1 + k, token]) >= UNLIKELY for k, token in enumerate(tokens)]
    assert False in likely[:-1], "the model must have an opinion, or nothing is tested"
    assert opening == tuple(tokens[: likely.index(False) + 1])


def test_the_learning_rate_rises_holds_and_falls() -> None:
    fit = object.__new__(Fit)
    fit.config = FitConfig(lr=1.0, warmup=4, decay_from=0.2, decay_to=0.6, lr_floor=0.25)
    fit._planned, fit._warm_from, fit.lr_scale = 100, 0, 1.0
    found = []
    for fit.steps in (1, 4, 20, 40, 59, 90):
        found.append(fit.lr)
    assert found == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.25, 0.25])
    fit.steps, fit._warm_from, fit.lr_scale = 42, 40, 0.5
    assert fit.lr == pytest.approx(0.5 * 0.5 * 0.45)
    assert (fit.until_settled, fit.settled) == (18, False)
    fit.steps = 60
    assert (fit.until_settled, fit.settled) == (0, True)


@pytest.mark.parametrize(("count", "named"), [(600, 10), (600, 1), (20, 10), (20, 0), (0, 4)])
def test_anchors_have_their_share_and_no_prompt_is_left_out(count: int, named: int) -> None:
    prompts = [f"row {i}" for i in range(count)] + [f"anchor {i}" for i in range(named)]
    anchors = frozenset(prompts[count:]) | {"in no file"}
    found = [prompts[i] for i in _with_anchor_share(prompts, anchors)]
    assert set(found) == set(prompts)
    assert sum(prompt not in anchors for prompt in found) == count
    times = {found.count(prompt) for prompt in anchors & set(prompts)}
    assert len(times) <= 1, "anchors are repeated alike"
    if count == 600:
        repeated = sum(prompt in anchors for prompt in found)
        assert abs(repeated - ANCHOR_SHARE * len(found)) <= named
    else:
        assert len(found) == len(prompts), "what has its share is not repeated"
