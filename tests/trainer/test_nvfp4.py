"""NVFP4 against a reference in float64 that shares nothing with the product but the format's definition."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import nvfp4_plain
from trainer.nvfp4 import (
    NonFiniteError,
    Rule,
    dequantise,
    fake_quantise,
    fake_quantise_,
    quantise,
    quantise_activations,
    quantise_with_scales,
)

F64 = NDArray[np.float64]
LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(c & 7) * 2.0**-9 if c < 8 else (1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7) for c in range(127)])
RULES: list[Rule] = ["mse", "amax"]
PIECE = 16384 * 16  # elements that the fast path works on at a time


def nearest(x: F64, grid: F64) -> NDArray[np.int64]:
    """Index of the nearest point of a grid, ties to the even index; exact, because the midpoints are."""
    middle = (grid[1:] + grid[:-1]) / 2
    up = x[..., None] > middle
    even = (x[..., None] == middle) & (np.arange(len(middle)) % 2 == 1)
    return np.asarray((up | even).sum(-1))


def amax_codes(blocks: F64) -> NDArray[np.int64]:
    """Reference of the rule `amax` for [n, 16]."""
    amax = np.abs(blocks).max(-1)
    # 6 x a midpoint of E4M3 is exact and so is amax, where amax / 6 is not.
    code = np.maximum(nearest(amax, E4M3 * 6), 1)
    return np.where(amax > 0, code, 0)


def errors(blocks: F64, codes: NDArray[np.int64]) -> tuple[F64, F64]:
    """Squared error of each block under a scale, and how far float32 arithmetic may be off."""
    s = E4M3[codes][:, None]
    y = np.abs(blocks) / s
    d = y - LEVELS[reference_index(blocks, s)]
    slack = 2.0**-19 * (d * d).sum(-1) + 2.0**-21 * np.abs(d).sum(-1) + 2.0**-40
    return (d * d).sum(-1) * s[:, 0] ** 2, slack * s[:, 0] ** 2


def reference_index(blocks: F64, s: F64) -> NDArray[np.int64]:
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2 * s[..., None]
    a = np.abs(blocks)[..., None]
    return np.asarray(((a > middle) | (a == middle) & (np.arange(7) % 2 == 1)).sum(-1))


def reference_nibbles(blocks: F64, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    s = np.where(codes == 0, np.inf, E4M3[codes])[:, None]
    return np.asarray(reference_index(blocks, s) + 8 * np.signbit(blocks))


def nibbles(qdata: Tensor) -> NDArray[np.int64]:
    q = qdata.numpy().reshape(-1, 8).astype(np.int64)
    return np.stack((q & 15, q >> 4), -1).reshape(-1, 16)


def code_of(scale: Tensor) -> NDArray[np.int64]:
    return np.asarray(scale.view(torch.uint8).numpy().reshape(-1).astype(np.int64))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(64, 320, generator=generator)
    cases = {f"std {std}": normal * std for std in (1e-5, 1e-3, 5e-3, 0.02, 0.05, 1.0, 60.0, 900.0, 1e6)}
    cases["mixed"] = normal * 2.0 ** torch.randint(-14, 14, (64, 320), generator=generator)
    cases["outliers"] = torch.where(torch.rand(64, 320, generator=generator) < 0.06, normal * 20, normal * 0.01)
    cases["few values"] = torch.randint(-12, 13, (64, 320), generator=generator) / 4
    cases["half zeros"] = torch.where(normal > 0, normal, -0.0)
    cases["extremes"] = torch.tensor([3.4e38, -3.4e38, 1e-45, -1e-45, 1e-38, 0.0, -0.0, 1.0] * 4).view(1, 32)
    # More than 6 x 448, beside values that 416 holds exactly: the lower of the two largest scales is the better one.
    cases["saturated"] = torch.tensor([[3584.0, *[2496.0] * 15]])
    return cases


SAMPLES = samples()


@pytest.mark.parametrize("name", SAMPLES)
def test_amax_is_the_reference(name: str) -> None:
    w = SAMPLES[name]
    qdata, scale = quantise(w, rule="amax")
    blocks = w.double().numpy().reshape(-1, 16)
    codes = amax_codes(blocks)
    assert np.array_equal(code_of(scale), codes)
    assert np.array_equal(nibbles(qdata), reference_nibbles(blocks, codes))


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_the_best_of_its_candidates(name: str) -> None:
    w = SAMPLES[name]
    qdata, scale = quantise(w)
    blocks = w.double().numpy().reshape(-1, 16)
    codes, base = code_of(scale), amax_codes(blocks)
    used = base > 0
    assert np.array_equal(codes[~used], base[~used])
    blocks, codes, base = blocks[used], codes[used], base[used]
    # The nearest code itself, before it was raised to at least 1, is what the steps start from.
    start = nearest(np.abs(blocks).max(-1), E4M3 * 6)
    steps = np.array([0, -1, 1, 2, 3, 4, 5])
    candidates = [np.clip(start + step, 1, 126) for step in steps]
    assert np.all(np.any([codes == candidate for candidate in candidates], axis=0))
    mine, slack = errors(blocks, codes)
    for candidate in candidates:
        other, other_slack = errors(blocks, candidate)
        assert np.all(mine <= other + slack + other_slack)
    assert np.array_equal(nibbles(qdata)[used], reference_nibbles(blocks, codes))


def test_equal_errors_go_to_the_code_nearest_amax() -> None:
    w = torch.tensor([[36.0, 18.0, 9.0, 0.0] * 4]) * 2.0**-9  # 6 x (6, 3, 1.5, 0) and 9 x (4, 2, 1, 0)
    assert [float(errors(w.double().numpy(), np.array([code]))[0][0]) for code in (6, 9)] == [0, 0]
    assert code_of(quantise(w)[1]).tolist() == [6]
    assert code_of(quantise(w * 1.5)[1]).tolist() == [9]  # 13.5, the other exact scale, is no code


@pytest.mark.parametrize("nudge", [-np.inf, 0, np.inf])
def test_ties_go_to_the_even_code_under_every_scale(nudge: float) -> None:
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    blocks = np.concatenate((E4M3[1:, None] * np.array([*middle, *-middle]), E4M3[1:, None] * [[6, -6]]), -1)
    w = blocks.astype(np.float32)
    assert np.array_equal(w, blocks)
    if nudge:
        w[:, :14] = np.nextafter(w[:, :14], np.float32(nudge) * np.sign(w[:, :14]))
    expected = {-np.inf: [0, 1, 2, 3, 4, 5, 6], 0: [0, 2, 2, 4, 4, 6, 6], np.inf: [1, 2, 3, 4, 5, 6, 7]}[nudge]
    row = [*expected, *(8 + code for code in expected), 7, 15]
    scale = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert nibbles(quantise_with_scales(torch.from_numpy(w), scale[:, None])).tolist() == [row] * 126
    qdata, chosen = quantise(torch.from_numpy(w), rule="amax")
    assert code_of(chosen).tolist() == list(range(1, 127))
    assert nibbles(qdata).tolist() == [row] * 126


def test_scales_round_ties_to_even() -> None:
    middle = (E4M3[1:] + E4M3[:-1]) / 2 * 6
    w = np.zeros((126, 16), np.float32)
    w[:, 3] = middle
    expected = [max(1, code + code % 2) for code in range(126)]
    assert code_of(quantise(torch.from_numpy(w), rule="amax")[1]).tolist() == expected


def test_relative_error_on_gaussian_weights() -> None:
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    error = {
        rule: float((dequantise(*quantise(w, rule=rule), dtype=torch.float32) - w).norm() / w.norm()) for rule in RULES
    }
    assert 0.0885 < error["mse"] < 0.0895
    assert 0.1025 < error["amax"] < 0.1036


def all_codes() -> tuple[Tensor, Tensor]:
    """Every byte of codes under every finite scale, also the negative ones."""
    scales = [code for code in range(256) if code & 127 not in (0, 127)]
    qdata = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    return qdata, torch.tensor(scales, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].expand(-1, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_decoding_is_exact_and_stored_scales_return_the_stored_codes(dtype: torch.dtype) -> None:
    qdata, scale = all_codes()
    w = dequantise(qdata, scale, dtype=dtype)
    sign = np.where(np.arange(16) < 8, 1, -1)
    level = (np.concatenate((LEVELS, LEVELS)) * sign)[nibbles(qdata)].reshape(len(qdata), -1)
    codes = code_of(scale).reshape(len(qdata), -1)
    value = np.repeat(E4M3[codes & 127] * np.where(codes < 128, 1, -1), 16, axis=1) * level
    assert np.array_equal(w.double().numpy(), value)
    assert np.array_equal(np.signbit(w.double().numpy()), np.signbit(value))
    assert torch.equal(quantise_with_scales(w, scale), qdata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_older_scale_types(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    qdata = torch.randint(0, 256, (40, 64), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(40, 8, generator=generator) * 0.02 + 1e-3).to(dtype)
    w = dequantise(qdata, scale)
    assert torch.equal(quantise_with_scales(w, scale), qdata)
    exact = dequantise(qdata, scale.double().float(), dtype=torch.float32)
    assert torch.equal(w, exact.bfloat16())  # rounded once
    assert torch.equal(exact.view(-1, 16), nvfp4_plain.decode(qdata.view(-1, 8), scale.reshape(-1)))


def test_zeros_and_underflow() -> None:
    w = torch.zeros(4, 16)
    w[0, 1] = -0.0
    w[1, 2], w[1, 3] = 1e-30, -1e-45  # far below the smallest scale: code 1, and nothing but signs is left
    w[2, 0], w[2, 1] = 2.0**-11, 2.0**-11 * (1 + 2.0**-23)  # a tie, and the next float32
    w[3] = 2.0**-9
    for rule in RULES:
        qdata, scale = quantise(w, rule=rule)
        assert code_of(scale).tolist() == [0, 1, 1, 1]
        found = nibbles(qdata)
        assert found[0].tolist() == [0, 8, *[0] * 14]
        assert found[1].tolist() == [0, 0, 0, 8, *[0] * 12]
        assert found[2].tolist() == [0, 1, *[0] * 14]
        assert found[3].tolist() == [2] * 16
        assert torch.equal(quantise_with_scales(dequantise(qdata, scale), scale), qdata)


def test_a_scale_of_zero_keeps_only_signs() -> None:
    w = torch.tensor([[1.0, -1.0, 0.0, -0.0] * 4])
    scale = torch.zeros(1, 1).to(torch.float8_e4m3fn)
    assert nibbles(quantise_with_scales(w, scale)).tolist() == [[0, 8, 0, 8] * 4]


def test_saturation_and_outliers() -> None:
    w = torch.full((1, 32), 0.01)
    w[0, 0], w[0, 16], w[0, 17] = 100.0, -1e6, 2688.0
    for rule in RULES:
        qdata, scale = quantise(w, rule=rule)
        assert nibbles(qdata)[0].tolist()[1:] == [0] * 15
        assert code_of(scale)[1] == 126
        assert nibbles(qdata)[1].tolist() == [15, 7, *[0] * 14]
        value = dequantise(qdata, scale)
        assert value[0, 16:18].tolist() == [-2688.0, 2688.0]
        assert abs(value[0, 0] - 100) <= 4
    assert code_of(quantise(SAMPLES["saturated"])[1]).tolist() == [125]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 17, PIECE + 31])
def test_infinities_and_nan_are_refused_by_name(bad: float, where: int) -> None:
    w = torch.full((2, PIECE), 0.02)
    w.view(-1)[where] = bad
    good = quantise(torch.full((2, PIECE), 0.02))[1]
    for rule in RULES:
        for call in (
            lambda rule=rule: quantise(w, rule=rule, name="lm_head.weight"),
            lambda rule=rule: fake_quantise_(w, torch.empty_like(w), rule=rule, name="lm_head.weight"),
            lambda rule=rule: fake_quantise(w, rule=rule, name="lm_head.weight"),
            lambda: quantise_with_scales(w, good, name="lm_head.weight"),
        ):
            with pytest.raises(NonFiniteError, match=rf"'lm_head\.weight'.*1 weights.*flat index {where}$"):
                call()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_scales_that_are_nan_are_refused_by_name(dtype: torch.dtype) -> None:
    scale = torch.ones(3, 2)
    scale[1, 1] = float("nan")
    qdata = torch.zeros(3, 16, dtype=torch.uint8)
    with pytest.raises(NonFiniteError, match=r"'a'.*1 scales.*flat index 3$"):
        dequantise(qdata, scale.to(dtype), name="a")
    with pytest.raises(NonFiniteError, match=r"'a'.*1 scales.*flat index 3$"):
        quantise_with_scales(torch.zeros(3, 32), scale.to(dtype), name="a")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantise_is_quantise_and_dequantise(rule: Rule, source: torch.dtype, target: torch.dtype) -> None:
    for name in ("std 0.02", "mixed", "outliers", "half zeros", "std 900.0"):
        w = SAMPLES[name].to(source)
        out = torch.empty(w.shape, dtype=target)
        fake_quantise_(w, out, rule=rule)
        assert torch.equal(bits(out), bits(dequantise(*quantise(w, rule=rule), dtype=target)))
        strided = torch.empty(w.shape[1], w.shape[0], dtype=target).T
        fake_quantise_(w.T.contiguous().T, strided, rule=rule)
        assert torch.equal(bits(out), bits(strided))
        if source == target:
            fake_quantise_(w := w.clone(), w, rule=rule)
            assert torch.equal(bits(out), bits(w))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SAMPLES)
def test_the_fast_path_is_the_plain_one(rule: Rule, name: str) -> None:
    w = SAMPLES[name]
    qdata, scale = quantise(w, rule=rule)
    blocks = w.view(-1, 16)
    plain = nvfp4_plain.choose(blocks, rule)
    codes = nvfp4_plain.encode(blocks, plain)
    assert torch.equal(bits(scale).view(-1), bits(plain))
    assert torch.equal(qdata.view(-1, 8), codes)
    value = dequantise(qdata, scale, dtype=torch.float32)
    assert torch.equal(bits(value).view(-1, 16), bits(nvfp4_plain.decode(codes, plain)))
    assert torch.equal(bits(value).view(-1, 16), bits(nvfp4_plain.fake(blocks, plain)))


@pytest.mark.parametrize("blocks", [1, 16383, 16384, 16385, 3 * 16384 - 1])
def test_neither_threads_nor_pieces_change_a_bit(blocks: int) -> None:
    w = torch.randn(blocks, 16, generator=torch.Generator().manual_seed(blocks)) * 0.02
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            qdata, scale = quantise(w)
            out = torch.empty(w.shape, dtype=torch.bfloat16)
            fake_quantise_(w, out)
            results.append((qdata, bits(scale), bits(out), bits(dequantise(qdata, scale))))
            assert torch.get_num_threads() == threads
            seen: list[int] = []
            new = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            new.start()
            new.join()
            assert seen == [threads]
    finally:
        torch.set_num_threads(before)
    scale = nvfp4_plain.choose(w, "mse")
    assert torch.equal(results[0][1].view(-1), bits(scale))
    assert torch.equal(results[0][0], nvfp4_plain.encode(w, scale))
    assert torch.equal(results[0][2], results[0][3])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_rows() -> None:
    qdata, scale = quantise(torch.empty(0, 32))
    assert (qdata.shape, scale.shape, dequantise(qdata, scale).shape) == ((0, 16), (0, 2), (0, 32))


def test_the_gradient_goes_straight_through() -> None:
    w = SAMPLES["std 0.02"].clone().requires_grad_()
    factor = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    out = fake_quantise(w, rule="amax")
    assert torch.equal(out, dequantise(*quantise(w.detach(), rule="amax"), dtype=torch.float32))
    torch.autograd.backward((out * factor).sum())
    assert w.grad is not None
    assert torch.equal(w.grad, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
    y = quantise_activations(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    rows = x.detach().view(6, 64)
    assert torch.equal(y.detach().view(6, 64), dequantise(*quantise(rows, rule="amax"), dtype=dtype))
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    assert bool((x.grad == 1).all())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_activation_spoils_its_block_and_no_other(bad: float) -> None:
    x = torch.ones(2, 48)
    x[1, 20] = bad
    y = quantise_activations(x)
    assert bool(y[1, 16:32].isnan().all())
    assert y.isnan().sum() == 16
    blocks = x.view(-1, 16)
    scale = nvfp4_plain.choose(blocks, "amax")
    plain = nvfp4_plain.decode(nvfp4_plain.encode(blocks, scale), scale).view(2, 48)
    assert torch.equal(y.nan_to_num(7.0), plain.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantise(torch.zeros(4, 24), name="a"), ValueError, r"'a'.*\(4, 24\).*divisible by 16"),
        (lambda: quantise(torch.zeros(16), name="a"), ValueError, r"'a'.*\(16,\)"),
        (lambda: quantise(torch.zeros(2, 16, dtype=torch.float64), name="a"), TypeError, "'a' is torch.float64"),
        (lambda: quantise(torch.zeros(2, 16), rule="best"), ValueError, "'best'.*mse, amax"),  # type: ignore[arg-type]
        (lambda: quantise_with_scales(torch.zeros(2, 16), torch.ones(1, 2)), ValueError, r"\(1, 2\), not \(2, 1\)"),
        (lambda: dequantise(torch.zeros(2, 8), torch.ones(2, 1), name="a"), ValueError, "'a'.*not uint8"),
        (
            lambda: dequantise(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.bfloat16)),
            TypeError,
            "bfloat16",
        ),
        (lambda: fake_quantise_(torch.zeros(2, 16), torch.zeros(2, 32), name="a"), ValueError, r"'a'.*\(2, 32\)"),
    ],
)
def test_misuse(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SAMPLES)
def test_a_gpu_gives_the_same_bits(rule: Rule, name: str) -> None:
    w = SAMPLES[name]
    expected = quantise(w, rule=rule)
    found = quantise(w.cuda(), rule=rule)
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(bits(found[1].cpu()), bits(expected[1]))
    assert torch.equal(quantise_with_scales(w.cuda(), found[1]).cpu(), expected[0])
    for dtype in (torch.float32, torch.bfloat16):
        value = dequantise(*expected, dtype=dtype)
        assert torch.equal(bits(dequantise(*found, dtype=dtype).cpu()), bits(value))
        out = torch.empty_like(w.cuda(), dtype=dtype)
        fake_quantise_(w.cuda(), out, rule=rule)
        assert torch.equal(bits(out.cpu()), bits(value))
