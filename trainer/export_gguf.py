"""A ``.dat`` as a GGUF file for llama.cpp, nothing rounded.

    write_gguf(Path("x.dat"), Path("models/mine"), Path("out.gguf"))

Decoded NVFP4 is written as BF16 (exact), other matrices in the type that they are stored in, vectors as F32. What
llama.cpp would compute otherwise is refused: stretched rotary positions, sliding windows, other activations, biases
where its architecture has none, and tokenizers without a name there (``gguf_tokenizer``).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.export_source import ExportSource
from trainer.gguf_tokenizer import add_tokenizer
from trainer.transfer import TransferError, refuse_existing


def write_gguf(path: Path, folder: Path, out: Path) -> None:
    """Write the GGUF file ``out`` of ``path``, configuration and tokenizer from ``folder``.

    Raises TransferError, DatError, ModelError, OSError; nothing is left behind then, and nothing is overwritten.
    """
    import gguf

    refuse_existing(out)
    with ExportSource(path, folder) as source:
        _refuse_what_differs(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
            fresh = Path(work) / "fresh.gguf"
            writer = gguf.GGUFWriter(fresh, source.config.model_type)
            try:
                _add_numbers(writer, source)
                add_tokenizer(writer, folder, source.tokenizer, int(source.config.vocab_size))
                _write_tensors(writer, source)
            finally:
                writer.close()
            refuse_existing(out)
            fresh.rename(out)


def _refuse_what_differs(source: ExportSource) -> None:
    config, where = source.config, source.folder / "config.json"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        raise TransferError(f"{where}: rope scaling {rope!r} cannot be exported as GGUF")
    if config.hidden_act != "silu":
        raise TransferError(f"{where}: activation {config.hidden_act!r} cannot be exported as GGUF: only silu")
    if getattr(config, "use_sliding_window", False):
        raise TransferError(f"{where}: a sliding window cannot be exported as GGUF")
    if config.model_type == "qwen2" and _head(config) * config.num_attention_heads != config.hidden_size:
        raise TransferError(f"{where}: llama.cpp takes no qwen2 model with heads of {_head(config)} features")
    biases = [name for name in source.shapes if name.endswith(".bias")]
    if config.model_type != "qwen2" and biases:
        raise TransferError(f"{source.path}: {biases[0]}: a {config.model_type} model in GGUF has no biases")


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_numbers(writer: Any, source: ExportSource) -> None:
    import gguf

    config = source.config
    head = _head(config)
    writer.add_name(source.path.stem)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_tensors(writer: Any, source: ExportSource) -> None:
    """Two passes: sizes first, so that one tensor at a time is in memory."""
    import gguf

    config = source.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name in source.shapes:
        data = _stored(source, name)
        kind = gguf.GGMLQuantizationType.BF16 if data.dtype.name == "uint8" else None
        writer.add_tensor_info(
            names.get_name(name, try_suffixes=(".weight", ".bias")), data.shape, data.dtype, data.nbytes, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in source.shapes:
        writer.write_tensor_data(_stored(source, name))


def _stored(source: ExportSource, name: str) -> Any:
    """The numpy array of a parameter in GGUF: float32, float16, or the bytes of bfloat16 as uint8."""
    values, config = source.values(name), source.config
    if config.model_type == "llama":
        if ".self_attn.q_proj." in name:
            values = rows_interleaved(values, config.num_attention_heads)
        elif ".self_attn.k_proj." in name:
            values = rows_interleaved(values, config.num_key_value_heads)
    if values.ndim < 2:
        return values.float().numpy()
    return (values.contiguous().view(torch.uint8) if values.dtype == torch.bfloat16 else values).numpy()


def rows_interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's row order of rotary weights: each head's (2, dim / 2) rows as (dim / 2, 2)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
