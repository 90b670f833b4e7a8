"""The CUDA path against the plain one, bit for bit; on a machine without a device these are skipped."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer import nvfp4_plain, nvfp4_triton
from trainer.nvfp4 import (
    NonFiniteError,
    Rule,
    dequantise,
    fake_quantise_,
    quantise,
    quantise_activations,
    quantise_with_scales,
)
from trainer.nvfp4_many import fake_quantise_many_, quantise_many

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nvfp4_triton.available(), reason="no CUDA device with Triton"),
]
RULES: list[Rule] = ["mse", "amax"]


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def weights(rows: int = 4096) -> Tensor:
    """Magnitudes from those that round to zero up to saturation, in blocks of all kinds."""
    generator = torch.Generator(device="cuda").manual_seed(3)
    normal = torch.randn(rows, 256, device="cuda", generator=generator)
    size = torch.randint(-16, 15, (rows, 16), device="cuda", generator=generator).repeat_interleave(16, 1)
    w = normal * torch.exp2(size.float()) * 0.7
    w[:: rows // 8, :16] = 0
    w[1 :: rows // 8, :8] = -0.0
    return w


def plain(w: Tensor, rule: Rule, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    blocks = w.float().view(-1, 16)
    scale = nvfp4_plain.choose(blocks, rule)
    if keep is not None:
        flat = keep.view(-1)
        fits = blocks.abs().amax(-1) <= 6 * flat.float()
        scale = torch.where(fits, flat.view(torch.uint8), scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    return nvfp4_plain.encode(blocks, scale).view(len(w), -1), scale.view(len(w), -1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_the_plain_path(rule: Rule, dtype: torch.dtype) -> None:
    w = weights().to(dtype)
    w = torch.where(torch.isfinite(w), w, 1)
    for found, expected in zip(quantise(w, rule=rule), plain(w, rule), strict=True):
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("rule", RULES)
def test_kept_scales_stay_unless_outgrown(rule: Rule) -> None:
    w = weights()
    keep = quantise(w)[1]
    grown = w.clone()
    grown[::37] *= 3
    keep.view(torch.uint8)[::41] |= 0x80  # a negative scale holds nothing; minus zero holds zeros
    expected = plain(grown, rule, keep)
    found = quantise(grown, rule=rule, keep=keep)
    assert torch.equal(bits(found[1]), bits(expected[1]))
    assert torch.equal(bits(found[0]), bits(expected[0]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.empty_like(grown, dtype=dtype)
        fake_quantise_(grown, out, rule=rule, keep=keep)
        value = nvfp4_plain.fake(grown.view(-1, 16), expected[1].view(-1)).to(dtype)
        assert torch.equal(bits(out.view(-1, 16)), bits(value))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_given_scales_are_used_as_they_are(dtype: torch.dtype) -> None:
    w = weights()
    scale = (plain(w, "amax")[1].float() * 1.01).to(dtype)
    codes = quantise_with_scales(w, scale)
    assert torch.equal(bits(codes.view(-1, 8)), bits(nvfp4_plain.encode(w.view(-1, 16), scale.view(-1))))
    for out in (torch.float32, torch.bfloat16, torch.float16):
        value = nvfp4_plain.decode(codes.view(-1, 8), scale.view(-1)).to(out)
        assert torch.equal(bits(dequantise(codes, scale, dtype=out).view(-1, 16)), bits(value))


def test_every_scale_byte_and_every_code_is_decoded() -> None:
    byte = torch.arange(256, dtype=torch.uint8, device="cuda")
    scale = byte[(byte & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    codes = byte.view(-1, 8).repeat(len(scale), 1)
    found = dequantise(codes, scale.repeat_interleave(32)[:, None], dtype=torch.float32)
    assert torch.equal(bits(found), bits(nvfp4_plain.decode(codes, scale.repeat_interleave(32))))


def test_the_quotient_by_hand_is_the_ieee_one() -> None:
    """All 2^23 significands of a dividend, under every E4M3 significand; scaling by powers of two changes neither."""
    import triton
    import triton.language as tl

    quotient = nvfp4_triton._quotient

    @triton.jit
    def divide(a, s, out, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        divisor = tl.load(s)
        value = quotient(tl.load(a + place), divisor, tl.div_rn(1.0, divisor))
        tl.store(out + place, value)

    count = 1 << 23
    a = (torch.arange(count, dtype=torch.int32, device="cuda") | 127 << 23).view(torch.float32)
    out = torch.empty_like(a)
    for exponent in (-9, -6, 0, 8):
        for step in range(8):
            s = torch.tensor([(1 + step / 8) * 2.0**exponent], device="cuda")
            divide[(count // 1024,)](a, s, out, count, SIZE=1024, enable_fp_fusion=False)
            assert torch.equal(bits(out), bits((a.double() / s.double()).float())), (exponent, step)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    "work",
    [
        lambda w, keep: quantise(w, name="a"),
        lambda w, keep: quantise(w, name="a", keep=keep),
        lambda w, keep: quantise_many([("b", torch.ones_like(w), None), ("a", w, keep)]),
        lambda w, keep: quantise_with_scales(w, keep, name="a"),
        lambda w, keep: fake_quantise_(w, torch.empty_like(w), name="a"),
        lambda w, keep: fake_quantise_many_([("b", torch.ones_like(w), torch.empty_like(w), None),
                                             ("a", w, torch.empty_like(w), keep)]),
    ],
)  # fmt: skip
def test_what_cannot_be_rounded_is_named(value: float, work: Callable[[Tensor, Tensor], object]) -> None:
    w = weights(64)
    keep = quantise(w)[1]
    w[33, 77] = value
    with pytest.raises(
        NonFiniteError, match=f"'a': 1 weights are infinite or NaN, the first at flat index {33 * 256 + 77}"
    ):
        work(w, keep)


def test_a_broken_scale_is_named() -> None:
    w = weights(64)
    codes, keep = quantise(w)
    keep.view(torch.uint8)[3, 5] = 0x7F
    for work in (lambda: quantise(w, name="a", keep=keep), lambda: dequantise(codes, keep, name="a")):
        with pytest.raises(NonFiniteError, match="'a': 1 scales are infinite or NaN, the first at flat index 53"):
            work()


def test_many_are_rounded_as_one_by_one() -> None:
    w = weights()
    keep = quantise(w)[1]
    sources = [w[:7] * 1.5, w[:, :64].contiguous(), w[:0]]
    kept = [keep[:7].contiguous(), None, None]
    outs = [torch.empty_like(source, dtype=torch.bfloat16) for source in sources]
    fake_quantise_many_(list(zip(("x", "y", "z"), sources, outs, kept, strict=True)), rule="mse")
    for source, out, scale in zip(sources, outs, kept, strict=True):
        one = torch.empty_like(out)
        fake_quantise_(source, one, keep=scale)
        assert torch.equal(bits(out), bits(one))
    for source, scale, found in zip(
        sources, kept, quantise_many(list(zip(("x", "y", "z"), sources, kept, strict=True))), strict=True
    ):
        expected = quantise(source, keep=scale)
        assert [torch.equal(bits(x), bits(y)) for x, y in zip(found, expected, strict=True)] == [True, True]


def test_activations_with_an_infinity_become_nan_in_their_block_alone() -> None:
    x = weights(8).to(torch.bfloat16)
    clean = quantise_activations(x)
    x[2, 40] = float("inf")
    found = quantise_activations(x)
    assert bool(found[2, 32:48].isnan().all())
    found[2, 32:48] = clean[2, 32:48]
    assert torch.equal(bits(found), bits(clean))
