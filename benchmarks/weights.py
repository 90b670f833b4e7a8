"""How fast weights are quantised and decoded on this CPU, beside a plain copy in the same run.

    python benchmarks/weights.py                # 2 threads
    python benchmarks/weights.py --threads 8 --millions 256 --repeat 5
    python benchmarks/weights.py --device cuda                # benchmarks/whole_model.py

Prints the best of some repetitions in million weights a second and in GB/s of float32 weights (the copy counts what it
reads). `cpu` is what the threads would reach if each had a core of its own: weights per second of CPU time, times the
threads. Where it is far above the wall-clock figure, something else was running.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import whole_model

from trainer.dat import DatReader, DatWriter, ScalarType, copy_entry
from trainer.nvfp4 import dequantise, fake_quantise_, quantise, quantise_activations, quantise_with_scales


def measure(work: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Least wall-clock and CPU seconds of some runs, after one that warms up."""
    work()
    walls, cpus = [], []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def files(megabytes: int, repeat: int) -> None:
    """Rewriting a `.dat` entry by entry beside copying the file, both down to the disk; in the system's temporary
    folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.dat", Path(folder) / "b.dat"
        data = torch.randint(0, 256, (megabytes << 16,), dtype=torch.uint8)
        with DatWriter(source, 16) as writer:
            for index in range(16):
                writer.write(f"layer.{index}", data, ScalarType.UINT8)

        def rewrite() -> None:
            with DatReader(source) as reader, DatWriter(target, len(reader.entries)) as writer:
                for name in reader.entries:
                    copy_entry(reader, writer, name)

        def copy() -> None:
            shutil.copyfile(source, target)
            with target.open("rb+") as file:
                os.fsync(file.fileno())

        print(f"\n{megabytes} MiB on disk{'':20}{'GB/s':>8}")
        for label, work in {"copy the file": copy, "rewrite it as .dat": rewrite}.items():
            print(f"{label:32}{megabytes * 1.048576e-3 / measure(work, repeat)[0]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads to use (default 2)")
    parser.add_argument("--millions", type=int, default=64, help="weights, in millions (default 64)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions, of which the best counts (default 3)")
    parser.add_argument("--megabytes", type=int, default=512, help="size of the file to rewrite, in MiB (default 512)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a whole model on the device")
    parser.add_argument("--layers", type=int, default=36, help="with cuda: layers of the model (default 36)")
    parser.add_argument("--folder", type=Path, help="with cuda: where the files go (default: the temporary folder)")
    options = parser.parse_args()
    if options.device == "cuda":
        whole_model.run(options.layers, options.repeat, options.folder)
        return
    torch.set_num_threads(options.threads)

    w = torch.randn(options.millions * 1_000_000 // 4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    same, half = torch.empty_like(w), torch.empty_like(w, dtype=torch.bfloat16)
    qdata, scale = quantise(w)
    rows: dict[str, Callable[[], object]] = {
        "copy float32": lambda: same.copy_(w),
        "copy to bfloat16": lambda: half.copy_(w),
        "quantise mse": lambda: quantise(w),
        "quantise amax": lambda: quantise(w, rule="amax"),
        "quantise with stored scales": lambda: quantise_with_scales(w, scale),
        "fake_quantise_ mse -> bfloat16": lambda: fake_quantise_(w, half),
        "fake_quantise_ kept -> bfloat16": lambda: fake_quantise_(w, half, keep=scale),
        "fake_quantise_ mse -> float32": lambda: fake_quantise_(w, same),
        "fake_quantise_ amax -> bfloat16": lambda: fake_quantise_(w, half, rule="amax"),
        "dequantise -> bfloat16": lambda: dequantise(qdata, scale, out=half),
        "dequantise -> float32": lambda: dequantise(qdata, scale, out=same),
        "activations float32": lambda: quantise_activations(w),
    }
    millions = w.numel() / 1e6
    print(f"{millions:.0f} million weights, {options.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'':32}{'M/s':>8}{'GB/s':>8}{'cpu M/s':>9}")
    for label, work in rows.items():
        wall, cpu = measure(work, options.repeat)
        print(f"{label:32}{millions / wall:8.0f}{millions * 4e-3 / wall:8.2f}{millions / cpu * options.threads:9.0f}")
    if options.megabytes:
        files(options.megabytes, options.repeat)


if __name__ == "__main__":
    main()
