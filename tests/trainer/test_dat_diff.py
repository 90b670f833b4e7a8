"""Two files compared, and values that no weight can have, on files written in the test."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import dat_errors as err
from trainer.dat import DatReader, DatWriter, ScalarType
from trainer.dat_diff import diff
from trainer.dat_verify import value_problems

CODES = torch.full((2, 8), 0x22, dtype=torch.uint8)  # 1, 1: sixteen ones a row
SCALES = torch.tensor([[1.0], [2.0]])
TYPES = {
    torch.uint8: ScalarType.UINT8,
    torch.float16: ScalarType.FLOAT16,
    torch.float32: ScalarType.FLOAT32,
    torch.float8_e4m3fn: ScalarType.FLOAT8_E4M3FN,
    torch.bool: ScalarType.BOOL,
}
Entries = dict[str, torch.Tensor]


def layer(number: int) -> Entries:
    stem = f"model.layers.{number}.mlp.up_proj.weight"
    return {f"{stem}.qdata": CODES.clone(), f"{stem}.scale": SCALES.to(torch.float8_e4m3fn)}


def entries() -> Entries:
    return {"model.norm.weight": torch.tensor([3.0, 4.0]).half(), **layer(0), **layer(11)}


def save(path: Path, tensors: Entries) -> Path:
    with DatWriter(path, len(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor, TYPES[tensor.dtype])
    return path


def compared(folder: Path, change: Callable[[Entries], Any]) -> Any:
    after = entries()
    change(after)
    return diff(save(folder / "a.dat", entries()), save(folder / "b.dat", after))


def test_equal_files_do_not_differ(tmp_path: Path) -> None:
    found = compared(tmp_path, lambda _: None)
    assert not found.changed
    assert [(g.name, g.tensors, g.parameters) for g in found.groups] == [
        ("model.norm.weight", 1, 2),
        ("model.layers.N.mlp.up_proj.weight", 2, 64),
    ]
    assert {g.relative_change for g in found.groups} == {0.0}


def test_codes_and_scales_are_counted_apart_and_the_change_is_that_of_the_values(tmp_path: Path) -> None:
    def change(after: Entries) -> None:
        after["model.layers.11.mlp.up_proj.weight.qdata"][0, 0] = 0x24  # the even column becomes 2
        after["model.layers.0.mlp.up_proj.weight.scale"][1, 0] = 4.0  # sixteen values from 2 to 4

    norm, up = compared(tmp_path, change).groups
    assert not norm.changed
    assert (up.codes_changed, up.scales_changed) == (1, 1)
    # before: 2 x (16 x 1 + 16 x 4); the changes: one of 1, sixteen of 2
    assert up.relative_change == pytest.approx(math.sqrt((1 + 16 * 4) / 160))


def test_both_codes_of_a_byte_count(tmp_path: Path) -> None:
    _, up = compared(tmp_path, lambda after: after["model.layers.0.mlp.up_proj.weight.qdata"][1, 3].fill_(0x33)).groups
    assert up.codes_changed == 2


def test_a_raw_tensor_is_compared_by_its_elements(tmp_path: Path) -> None:
    norm, up = compared(tmp_path, lambda after: after["model.norm.weight"][1].fill_(-4.0)).groups
    assert (norm.codes_changed, norm.scales_changed, up.changed) == (1, 0, False)
    assert norm.relative_change == pytest.approx(8 / 5)


def test_what_only_one_file_holds_or_stores_otherwise_is_said(tmp_path: Path) -> None:
    def change(after: Entries) -> None:
        del after["model.layers.11.mlp.up_proj.weight.qdata"], after["model.layers.11.mlp.up_proj.weight.scale"]
        after["model.norm.weight"] = after["model.norm.weight"].float()
        after["lm_head.weight"] = torch.ones(2)

    found = compared(tmp_path, change)
    a, b = tmp_path / "a.dat", tmp_path / "b.dat"
    assert found.odd == (
        f"model.norm.weight: FLOAT16 [2] in {a}, FLOAT32 [2] in {b}",
        f"model.layers.11.mlp.up_proj.weight: only in {a}",
        f"lm_head.weight: only in {b}",
    )
    assert found.changed
    assert not any(group.changed for group in found.groups)


def test_from_zero_on_a_change_is_infinite(tmp_path: Path) -> None:
    found = diff(
        save(tmp_path / "a.dat", {"x": torch.zeros(2)}), save(tmp_path / "b.dat", {"x": torch.tensor([0.0, 1e-30])})
    )
    assert found.groups[0].relative_change == math.inf


def test_a_scale_that_is_not_a_number_is_refused_by_name(tmp_path: Path) -> None:
    def change(after: Entries) -> None:
        after["model.layers.0.mlp.up_proj.weight.scale"].view(torch.uint8)[0, 0] = 0x7F

    with pytest.raises(err.NonFiniteValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        compared(tmp_path, change)


@pytest.mark.parametrize(
    ("tensors", "kind", "entry", "element", "count"),
    [
        ({"x": torch.tensor([1.0, math.nan, math.inf])}, err.NonFiniteValueError, "x", 1, 2),
        ({"x": torch.tensor([1.0, -math.inf]).half()}, err.NonFiniteValueError, "x", 1, 1),
        (
            {"w.qdata": CODES, "w.scale": torch.tensor([[1.0], [math.nan]]).to(torch.float8_e4m3fn)},
            err.NonFiniteValueError,
            "w.scale",
            1,
            1,
        ),
        ({"w.qdata": CODES, "w.scale": torch.tensor([[1.0], [-2.0]])}, err.NegativeScaleError, "w.scale", 1, 1),
    ],
)
def test_a_value_that_no_weight_can_have_is_named_with_its_place(
    tmp_path: Path, tensors: Entries, kind: type[err.DatError], entry: str, element: int, count: int
) -> None:
    with DatReader(save(tmp_path / "x.dat", {"first": torch.ones(3), **tensors})) as reader:
        [problem] = value_problems(reader)
        stored = reader.entries[entry]
    assert type(problem) is kind
    assert (problem.entry, problem.offset) == (entry, stored.offset + element * stored.scalar_type.itemsize)
    assert f" {count} of " in f" {str(problem).split(': ', 1)[1]}"


def test_a_bool_of_three_is_found_and_the_next_entry_looked_at(tmp_path: Path) -> None:
    path = save(tmp_path / "x.dat", {"flag": torch.ones(1, dtype=torch.bool), "x": torch.tensor([math.nan])})
    data = bytearray(path.read_bytes())
    with DatReader(path) as reader:
        data[reader.entries["flag"].offset] = 3
    path.write_bytes(data)
    with DatReader(path) as reader:
        assert [type(problem) for problem in value_problems(reader)] == [err.InvalidBoolError, err.NonFiniteValueError]


def test_a_sound_file_has_no_problems(tmp_path: Path) -> None:
    with DatReader(save(tmp_path / "x.dat", entries())) as reader:
        assert list(value_problems(reader)) == []
