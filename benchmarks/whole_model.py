"""A whole model of Qwen3-4B's dimensions on a CUDA device: read, quantise, fake-quantise, export, beside plain copies.

    python benchmarks/weights.py --device cuda                # 3 GB of disk, 32 GB of device memory
    python benchmarks/weights.py --device cuda --layers 2     # a small one, to see that it works

The file holds random codes and scales; it is read from the page cache. A copy on the device counts what it reads and
what it writes, like every other row there; rows for files count the file's size.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainer.dat import DatReader, DatWriter, ScalarType
from trainer.gguf_base import is_paired
from trainer.model import decoded, parameter_shapes
from trainer.nvfp4_many import fake_quantise_many_, quantise_many
from trainer.staging import Staging


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of Qwen3-4B-Instruct-2507's architecture, lm_head apart."""
    from transformers import Qwen3Config

    return parameter_shapes(
        Qwen3Config(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
        )
    )


def write_random(path: Path, names: dict[str, tuple[int, ...]]) -> None:
    """A .dat of random codes, usual scales and float16 values for what is not quantised."""
    torch.manual_seed(0)
    pairs = sum(is_paired(name, shape) for name, shape in names.items())
    with DatWriter(path, len(names) + pairs) as writer:
        for name, shape in names.items():
            if is_paired(name, shape):
                codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device="cuda")
                scale = torch.randint(3, 12, (shape[0], shape[1] // 16), dtype=torch.uint8, device="cuda")
                writer.write(f"{name}.qdata", codes, ScalarType.UINT8)
                writer.write(f"{name}.scale", scale, ScalarType.FLOAT8_E4M3FN)
            else:
                writer.write(name, torch.randn(shape, device="cuda").half() * 0.02, ScalarType.FLOAT16)


def least(work: Callable[[], object], repeat: int) -> tuple[float, float]:
    """(first, least of the further) wall-clock seconds of some runs, the device's work included."""
    walls = []
    for _ in range(repeat + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)
    return walls[0], min(walls[1:])


def read_plainly(path: Path) -> None:
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def export(source: Path, target: Path, masters: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
    """What `Candidate.export` does: every pair quantised and written, in the file's order."""
    from trainer.candidate import write_like

    with DatReader(source) as reader:
        write_like(reader, target, masters, scales, rule="mse")


def run(layers: int, repeat: int, folder: Path | None) -> None:
    """Print the table."""
    names = shapes(layers)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        path, copy = Path(work) / "a.dat", Path(work) / "b.dat"
        write_random(path, names)
        size = path.stat().st_size
        paired = [name for name, shape in names.items() if is_paired(name, shape)]
        count = sum(torch.Size(names[name]).numel() for name in paired)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {len(paired)} pairs, {count / 1e6:,.0f} "
              f"million weights, a file of {size / 1e9:.2f} GB")  # fmt: skip
        print(f"{'':44}{'first ms':>10}{'ms':>9}{'GB/s':>9}")

        def row(label: str, job: Callable[[], object], nbytes: float) -> None:
            first, best = least(job, repeat)
            print(f"{label:44}{first * 1e3:10.1f}{best * 1e3:9.1f}{nbytes / best / 1e9:9.1f}", flush=True)

        row("read the file's bytes", lambda: read_plainly(path), size)
        locked = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        row("copy page-locked memory to the device", lambda: locked.to("cuda"), locked.numel())

        def read() -> dict[str, Tensor]:
            with DatReader(path) as reader, Staging("cuda") as staging:
                return {name: decoded(reader, name, staging).to(torch.bfloat16) for name in names}  # type: ignore[union-attr]

        row("read .dat to bfloat16 on the device", read, size)
        values = read()
        masters = {name: values[name].float() for name in paired}
        views = {name: values[name] for name in paired}
        with DatReader(path) as reader:
            pairs = reader.pairs()
            scales = {name: reader.tensor(pairs[name].scale.name, device="cuda") for name in paired}
        del values

        def copy_all() -> None:
            for name in paired:
                views[name].copy_(masters[name])

        def quantise_all(source: dict[str, Tensor], rule: str) -> object:
            return quantise_many([(name, source[name], None) for name in paired], rule=rule)  # type: ignore[arg-type]

        def fake_all(rule: str, keep: bool) -> None:
            fake_quantise_many_(
                [(name, masters[name], views[name], scales[name] if keep else None) for name in paired],
                rule=rule,  # type: ignore[arg-type]
            )

        row("copy float32 to bfloat16", copy_all, 6 * count)
        row("fake-quantise, kept scales", lambda: fake_all("mse", True), 6 * count)
        row("fake-quantise, amax", lambda: fake_all("amax", False), 6 * count)
        row("fake-quantise, mse", lambda: fake_all("mse", False), 6 * count)
        row("quantise float32, amax", lambda: quantise_all(masters, "amax"), 4.5625 * count)
        row("quantise float32, mse", lambda: quantise_all(masters, "mse"), 4.5625 * count)
        for name in paired:
            views[name].copy_(masters[name])
        row("quantise bfloat16, mse", lambda: quantise_all(views, "mse"), 2.5625 * count)
        row("copy the file, down to the disk", lambda: copy_file(path, copy), size)
        row("export, down to the disk", lambda: export(path, copy, masters, scales), size)
        row("copy the file, down to the disk", lambda: copy_file(path, copy), size)
        print("exported what was read:", "yes" if _same(path, paired, copy, scales, masters) else "NO")


def _same(path: Path, paired: list[str], copy: Path, scales: dict[str, Tensor], masters: dict[str, Tensor]) -> bool:
    """Whether the export of untrained masters is the file, byte for byte: codes of -0 under kept scales included."""
    export(path, copy, masters, scales)
    with DatReader(path) as a, DatReader(copy) as b:
        return all(a.raw(name) == b.raw(name) for name in a.entries) and len(a.entries) == len(b.entries)
