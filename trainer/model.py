"""A causal language model from a ``.dat`` and a model folder.

    lm = load(Path("models/smollm2-135m/base.dat"), device="cpu")
    lm.module(input_ids)            # transformers' own module, weights as the file stores them
    lm.render("你是誰")              # the prompt as the model's chat template (or the user's runner) writes it

The module is transformers' implementation of the architecture; its parameters are the file's values, decoded. Nothing
of a checkpoint is executed: no pickle, no remote code. ``lm_head`` is a parameter of its own whenever the file stores
it apart, whatever ``tie_word_embeddings`` says (dat-format.md).
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.dat import DatError, DatReader, ScalarType
from trainer.files import sha256_file
from trainer.numerics import Numerics, NumericsError, numerics_of, set_numerics
from trainer.nvfp4 import dequantise
from trainer.staging import Staging

Template = Literal["chat", "runner"]
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


class ModelError(Exception):
    """A .dat and a model folder that do not make a model; the message says which of them, and what to do."""


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (CUDA, AVX512-BF16, AMX, ARM BF16), else float32.

    Every NVFP4 value is exact in both, so this changes rounding of activations only. It is recorded with every result.
    """
    if device.type == "cuda":
        return torch.bfloat16
    if platform.machine().lower() in ("x86_64", "amd64"):
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def _skeleton(config: Any) -> nn.Module:
    """The architecture on the meta device: names and shapes, no memory."""
    from transformers import AutoModelForCausalLM

    untied = type(config)(**{**config.to_dict(), "tie_word_embeddings": False})
    with torch.device("meta"):
        module: nn.Module = AutoModelForCausalLM.from_config(untied, attn_implementation="sdpa")
    return module


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the architecture with lm_head apart, in state-dict order."""
    return {name: tuple(p.shape) for name, p in _skeleton(config).named_parameters()}


@dataclass(kw_only=True)
class LanguageModel:
    """A loaded model. ``module`` is in eval mode; its parameters are the decoded values of ``path``."""

    module: nn.Module
    tokenizer: Any
    config: Any
    folder: Path
    path: Path
    device: torch.device
    dtype: torch.dtype
    weights_sha256: str
    stop_ids: tuple[int, ...]
    paired: frozenset[str] = frozenset()
    """Parameters that the file stores as NVFP4 pairs."""
    _tokenizer_sha256: str = field(default="")

    @property
    def numerics(self) -> Numerics:
        """What enters the 4-bit layers now (``trainer.numerics``)."""
        return numerics_of(self.module)

    def use(self, numerics: Numerics) -> None:
        """Compute in ``numerics`` from here on: nothing is loaded again. Raises ModelError."""
        try:
            set_numerics(self.module, self.paired, numerics)
        except NumericsError as error:
            raise ModelError(f"{self.path}: {error}") from error

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.stop_ids[0])

    @property
    def tokenizer_sha256(self) -> str:
        """One hash over the folder's configuration, tokenizer and chat template files."""
        if not self._tokenizer_sha256:
            self._tokenizer_sha256 = folder_sha256(self.folder)
        return self._tokenizer_sha256

    def render(self, messages: str | Sequence[dict[str, str]], template: Template = "chat") -> str:
        """The text given to the model for a prompt (or a dialogue that ends with a user turn).

        ``chat`` is the model's own template; ``runner`` is the user's TorchSharp runner: no system message and a
        newline before ``<|im_end|>``.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        if template == "runner":
            body = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}\n<|im_end|>\n" for turn in turns)
            return body + "<|im_start|>assistant\n"
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text; nothing is added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def folder_sha256(folder: Path) -> str:
    """Hash of the files that decide how text becomes tokens and which architecture runs."""
    digest = sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(f"{name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def read_folder(folder: Path) -> tuple[Any, Any]:
    """(configuration, tokenizer) of a model folder. Raises ModelError when a file is missing or unreadable."""
    from transformers import AutoConfig, AutoTokenizer

    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise ModelError(f"{folder} is not a model folder: no {needed} in it (`align models get NAME` makes one)")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself for a broken tokenizer.json
        said = " ".join(str(error).split())
        raise ModelError(f"{folder}: configuration or tokenizer cannot be read: {said}") from error
    return config, tokenizer


def load(
    path: Path,
    *,
    folder: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    numerics: Numerics = "weights",
) -> LanguageModel:
    """Load a .dat with the configuration and tokenizer of ``folder`` (default: the file's own folder).

    Raises DatError (a broken file) and ModelError (no model folder, parameters missing or of the wrong shape).
    """
    device = torch.device(device)
    folder = folder or path.parent
    dtype = dtype or default_dtype(device)
    config, tokenizer = read_folder(folder)
    module = _skeleton(config)
    with DatReader(path) as reader:
        fill(module, reader, device=device, dtype=dtype, tied=bool(getattr(config, "tie_word_embeddings", False)))
        paired = frozenset(reader.pairs()) & {name for name, _ in module.named_parameters()}
    _materialise_buffers(module, config, device)
    module.eval().requires_grad_(False)
    lm = LanguageModel(
        module=module,
        tokenizer=tokenizer,
        config=config,
        folder=folder,
        path=path,
        device=device,
        dtype=dtype,
        weights_sha256=sha256_file(path),
        stop_ids=_stop_ids(config, tokenizer),
        paired=paired,
    )
    lm.use(numerics)
    return lm


def decoded(reader: DatReader, name: str, staging: Staging | None = None) -> Tensor | None:
    """Values of parameter ``name``: an NVFP4 pair decoded to bfloat16 (exact for E4M3 scales), a raw entry as stored;
    None where the file has neither. On the CPU, or on the device of ``staging``."""
    pair = reader.pairs().get(name)
    if pair is not None:
        codes, scale = (_uploaded(reader, entry.name, staging) for entry in (pair.qdata, pair.scale))
        return dequantise(codes, scale, dtype=torch.bfloat16, name=name)
    if name in reader.entries:
        return _uploaded(reader, name, staging)
    return None


def _uploaded(reader: DatReader, name: str, staging: Staging | None) -> Tensor:
    entry = reader.entries[name]
    if staging is None or entry.scalar_type is ScalarType.BOOL or not entry.nbytes:
        return reader.tensor(name)
    return staging.upload(reader.flat(name)).view(entry.scalar_type.dtype).view(entry.shape)


def fill(module: nn.Module, reader: DatReader, *, device: torch.device, dtype: torch.dtype, tied: bool) -> None:
    """Give every parameter of ``module`` its value from the file, in ``dtype`` on ``device``."""
    with Staging(device) if device.type == "cuda" else nullcontext() as staging:
        _fill(module, reader, staging, device=device, dtype=dtype, tied=tied)


def _fill(
    module: nn.Module,
    reader: DatReader,
    staging: Staging | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tied: bool,
) -> None:
    for name, parameter in list(module.named_parameters()):
        value = decoded(reader, name, staging)
        if value is None and name == "lm_head.weight" and tied:
            value = decoded(reader, "model.embed_tokens.weight", staging)
        if value is None:
            raise ModelError(
                f"{reader.path}: no entry for parameter {name}; is this the .dat of the model in the folder?"
            )
        if tuple(value.shape) != tuple(parameter.shape):
            raise ModelError(
                f"{reader.path}: {name} is {list(value.shape)} in the file, "
                f"{list(parameter.shape)} by the folder's config.json"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value.to(device=device, dtype=dtype, copy=True)))


def _materialise_buffers(module: nn.Module, config: Any, device: torch.device) -> None:
    """Rotary tables are computed, not stored: rebuild the modules whose buffers are still on the meta device."""
    for name, part in list(module.named_modules()):
        if any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            owner, _, leaf = name.rpartition(".")
            with torch.device(device):
                setattr(module.get_submodule(owner), leaf, type(part)(config=config))
    stuck = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if stuck:
        raise ModelError(f"unsupported architecture {config.model_type!r}: buffers {stuck} have no values")


def _stop_ids(config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end a reply: the model's own, and <|im_end|> and <|endoftext|> where the tokenizer has them."""
    eos = (
        config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id, tokenizer.eos_token_id]
    )
    vocabulary = tokenizer.get_vocab()
    named = [vocabulary.get(token) for token in ("<|im_end|>", "<|endoftext|>")]
    return tuple(sorted({int(i) for i in (*eos, *named) if i is not None}))


__all__ = [
    "DatError",
    "LanguageModel",
    "ModelError",
    "Template",
    "default_dtype",
    "load",
    "parameter_shapes",
    "read_folder",
]
