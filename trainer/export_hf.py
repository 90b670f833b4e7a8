"""A ``.dat`` as a folder that transformers loads: bfloat16, or the compressed-tensors layout of NVFP4.

    write_hf(Path("x.dat"), Path("models/mine"), Path("out"), layout="bfloat16")

Decoded NVFP4 is exact in bfloat16. Raw float16 and float32 entries (embeddings, norms, biases) are rounded to it, as
they are when align itself computes in bfloat16. Under ``nvfp4`` the projections keep their 4-bit codes; lm_head is
bfloat16, since loaders of that layout expect it so.

In the compressed-tensors layout a value is level x scale / global scale. The global scale here is a power of two, which
brings the small scales of our files into E4M3's normal range; multiplying an E4M3 number by it is exact, so the decoded
weights are the same to the bit. Projections that loaders fuse (q, k, v; gate, up) share one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.export_source import HEAD, ExportSource
from trainer.files import atomic_write
from trainer.safetensors_stream import Planned, write_sharded
from trainer.transfer import TransferError, copy_text_files, fresh_folder

Layout = Literal["bfloat16", "nvfp4"]
SHARD_BYTES = 5_000_000_000
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_LARGEST = 448.0


def write_hf(
    path: Path, folder: Path, out: Path, *, layout: Layout = "bfloat16", shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write the folder ``out`` of ``path``, configuration and tokenizer from ``folder``.

    Returns the names of the parameters that bfloat16 rounded. Raises TransferError, DatError, ModelError, OSError;
    nothing is left behind then.
    """
    with ExportSource(path, folder) as source, fresh_folder(out) as fresh:
        exponents = _exponents(source) if layout == "nvfp4" else {}
        rounded: list[str] = []
        write_sharded(
            fresh, list(_plan(source, exponents)), _tensors(source, exponents, rounded), shard_bytes=shard_bytes
        )
        copy_text_files(folder, fresh)
        with atomic_write(fresh / "config.json", "w") as file:
            json.dump(_config(source, exponents, layout), file, ensure_ascii=False, indent=2)
            file.write("\n")
    return rounded


def _plan(source: ExportSource, exponents: dict[str, int]) -> Iterator[Planned]:
    for name, shape in source.shapes.items():
        if name in exponents:
            rows, columns = shape
            yield Planned(name=f"{name}_packed", dtype=torch.uint8, shape=(rows, columns // 2))
            yield Planned(name=f"{name}_scale", dtype=torch.float8_e4m3fn, shape=(rows, columns // 16))
            yield Planned(name=f"{name}_global_scale", dtype=torch.float32, shape=(1,))
        else:
            yield Planned(name=name, dtype=torch.bfloat16, shape=shape)


def _tensors(source: ExportSource, exponents: dict[str, int], rounded: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in source.shapes:
        if name in exponents:
            pair, factor = source.pair(name), 2.0 ** exponents[name]
            assert pair is not None
            yield f"{name}_packed", source.reader.tensor(pair.qdata.name)
            yield f"{name}_scale", _scaled(source, name, factor)
            yield f"{name}_global_scale", torch.tensor([factor], dtype=torch.float32)
        else:
            values, inexact = source.bfloat16(name)
            rounded += [name] * inexact
            yield name, values


def _scaled(source: ExportSource, name: str, factor: float) -> Tensor:
    """The scales of a pair times ``factor``, E4M3 [out, in / 16]. Raises TransferError where that is not exact."""
    pair = source.pair(name)
    assert pair is not None
    scale = source.reader.tensor(pair.scale.name).float() * factor
    exact = scale.to(torch.float8_e4m3fn)
    if not torch.equal(exact.float(), scale):
        raise TransferError(
            f"{source.path}: the {pair.scale.scalar_type.name} scales of {name} do not fit the nvfp4 layout's E4M3; "
            f"export with --layout bfloat16"
        )
    return exact


def _exponents(source: ExportSource) -> dict[str, int]:
    """For each projection stored as a pair: the largest power of two that keeps its group's scales within E4M3."""
    largest: dict[str, float] = {}
    names = [name for name in source.shapes if name != HEAD and source.pair(name)]
    for name in names:
        pair = source.pair(name)
        assert pair is not None
        scale = source.reader.tensor(pair.scale.name).float()
        if not bool(torch.isfinite(scale).all()) or float(scale.max()) > _LARGEST:
            raise TransferError(f"{source.path}: the scales of {name} are not finite numbers up to {_LARGEST:g}")
        largest[_group(name)] = max(largest.get(_group(name), 0.0), float(scale.max()))
    if not names:
        raise TransferError(f"{source.path}: no NVFP4 pairs in it; export with --layout bfloat16")
    return {name: _exponent(largest[_group(name)]) for name in names}


def _exponent(largest: float) -> int:
    exponent = 0
    while 0 < largest * 2 ** (exponent + 1) <= _LARGEST:
        exponent += 1
    return exponent


def _group(name: str) -> str:
    for group in _FUSED:
        name = re.sub(rf"\.(?:{'|'.join(group)})\.", f".{group[0]}.", name)
    return name


def _config(source: ExportSource, exponents: dict[str, int], layout: Layout) -> dict[str, Any]:
    config = {key: value for key, value in source.plain.items() if key not in ("torch_dtype", "_name_or_path")}
    config |= {"dtype": "bfloat16", "tie_word_embeddings": source.tied}
    config.setdefault("architectures", [_CLASSES[config["model_type"]]])
    if layout == "nvfp4":
        linear = [name for name in (*source.shapes, HEAD) if name.endswith(("_proj.weight", HEAD))]
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "ignore": sorted({name.removesuffix(".weight") for name in linear if name not in exponents}),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "float",
                        "strategy": "tensor_group",
                        "group_size": 16,
                        "symmetric": True,
                        "dynamic": False,
                    },
                    "input_activations": None,
                    "output_activations": None,
                }
            },
        }
    return config
