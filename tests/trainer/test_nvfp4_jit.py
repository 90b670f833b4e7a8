"""The compiled pass of a training step: the plain path's results, bit for bit."""

from typing import Any

import pytest
import torch

from trainer import nvfp4_plain
from trainer.nvfp4 import NonFiniteError, dequantise, fake_quantise_, quantise, quantise_activations
from trainer.nvfp4_jit import ACTIVATION_PIECE

RULES = ("mse", "amax")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_refresh_under_kept_scales_is_the_plain_one_bit_for_bit(rule: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    w = 0.02 * torch.randn(70, 16 * 8192 // 64, generator=generator)
    keep = quantise(w)[1]
    w += 0.004 * torch.randn(w.shape, generator=generator)  # some blocks outgrow their scales
    w[0, :40] = torch.tensor([0.0, -0.0, 1e-30, -1e-45] * 10)
    w[1] = 0.0
    w[2, ::2] = dequantise(quantise(w)[0], quantise(w)[1], dtype=torch.float32)[2, ::2]
    codes = keep.view(torch.uint8).view(-1)
    codes[3], codes[4], codes[5], codes[130] = (
        0,
        1,
        126,
        0,
    )  # zero, the smallest, the largest; zero for a block of zeros
    found = torch.full_like(w, 7.0, dtype=dtype)
    fake_quantise_(w, found, rule=rule, keep=keep)
    expected = dequantise(*quantise(w, rule=rule, keep=keep), dtype=dtype)
    pattern = torch.int32 if dtype == torch.float32 else torch.int16
    differs = (found.view(pattern) != expected.view(pattern)).nonzero()
    assert differs.tolist() == []
    fresh = quantise(w, rule=rule, keep=keep)[1].view(torch.uint8) != keep.view(torch.uint8)
    assert 100 < int(fresh.sum()) < fresh.numel() // 2


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_refresh_refuses_what_is_not_finite_by_name(bad: float) -> None:
    w = torch.full((4, 32), 0.02)
    keep = quantise(w)[1]
    w[2, 5] = bad
    with pytest.raises(NonFiniteError, match=r"tensor 'x': 1 weights are infinite or NaN, the first at flat index 69"):
        fake_quantise_(w, torch.empty_like(w), name="x", keep=keep)
    keep.view(torch.uint8)[1, 1] = 0x7F
    with pytest.raises(NonFiniteError, match="'y'"):
        fake_quantise_(torch.full((4, 32), 0.02), torch.empty_like(w), name="y", keep=keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inference", [False, True])
def test_activations_are_the_plain_path_s_bit_for_bit(dtype: torch.dtype, inference: bool) -> None:
    """Of every size of scale, of zeros of both signs, of what is not finite; from several threads and in inference
    mode, where what one thread made another may not write."""
    generator = torch.Generator().manual_seed(12)
    rows = 5 * ACTIVATION_PIECE // 8
    with torch.inference_mode(inference):
        x = torch.randn(rows, 256, generator=generator) * torch.logspace(-9, 5, rows)[:, None]
        x[5], x[6], x[7, 3], x[8, 20] = 0.0, -0.0, float("inf"), float("nan")
        x[9, :32] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 4)  # ties, under a scale of 1
        x = x.to(dtype)
        found = quantise_activations(x)
        blocks = x.float().view(-1, 16)
        expected = nvfp4_plain.fake(blocks, nvfp4_plain.choose(blocks, "amax")).view(x.shape).to(dtype)
        pattern = torch.int32 if dtype == torch.float32 else torch.int16
        good = ~expected.isnan()
        assert torch.equal(found.isnan(), ~good)
        assert int((~good).sum()) >= 32
        assert torch.equal(found.view(pattern)[good], expected.view(pattern)[good])
