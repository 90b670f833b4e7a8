"""Bytes on a CUDA device are the bytes of the file; on a machine without a device these are skipped."""

from pathlib import Path

import pytest
import torch

from trainer import nvfp4_triton
from trainer.dat import DatReader, DatWriter, ScalarType
from trainer.model import decoded
from trainer.nvfp4 import quantise
from trainer.nvfp4_many import quantise_many
from trainer.rewrite import write_like
from trainer.staging import Staging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nvfp4_triton.available(), reason="no CUDA device with Triton"),
]


@pytest.mark.parametrize("size", [0, 1, (8 << 20) - 1, (8 << 20) + 3, 100 << 20])
def test_bytes_arrive_whole_and_before_what_follows(size: int) -> None:
    here = torch.randint(0, 256, (size,), dtype=torch.uint8)
    with Staging("cuda") as staging:
        for _ in range(3):
            busy = torch.full((max(size, 1),), 7, dtype=torch.uint8, device="cuda")
            for _ in range(20):
                busy.add_(1)  # still going when its memory is handed on
            del busy
            there = staging.upload(here)
            assert torch.equal(there.cpu(), here)


def test_a_file_read_to_the_device_and_written_back_is_the_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer.{i}.weight": torch.randn(96, 64, generator=generator) * 0.02 for i in range(5)}
    path, again = tmp_path / "a.dat", tmp_path / "b.dat"
    with DatWriter(path, 2 * len(weights) + 1) as writer:
        for name, weight in weights.items():
            codes, scale = quantise(weight)
            writer.write(f"{name}.qdata", codes, ScalarType.UINT8)
            writer.write(f"{name}.scale", scale, ScalarType.FLOAT8_E4M3FN)
        writer.write("norm.weight", torch.ones(64, dtype=torch.float16), ScalarType.FLOAT16)
    with DatReader(path) as reader, Staging("cuda") as staging:
        values, scales = {}, {}
        for name in (*weights, "norm.weight"):
            value, plain = decoded(reader, name, staging), decoded(reader, name)
            assert value is not None
            assert plain is not None
            assert value.is_cuda
            assert torch.equal(value.cpu(), plain)
            values[name] = value.float()
        for name in weights:
            scales[name] = reader.tensor(f"{name}.scale", device="cuda")
        write_like(reader, again, values, scales, rule="mse")
        found = quantise_many([(name, values[name], scales[name]) for name in weights])
        assert all(
            torch.equal(codes.cpu(), reader.tensor(f"{name}.qdata"))
            for name, (codes, _) in zip(weights, found, strict=True)
        )
    assert again.read_bytes() == path.read_bytes()
