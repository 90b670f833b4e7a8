"""llama.cpp itself reads exported files: the same tokens, the same next token, nearly the same probability."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_export_gguf import PROMPTS
from tiny_gguf import MODELS, tiny
from tiny_hf import write_hf

from trainer.export_gguf import write_gguf
from trainer.importer import import_model
from trainer.model import load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)


@pytest.mark.parametrize("architecture", MODELS)
def test_llama_cpp_says_what_align_says(tmp_path: Path, architecture: str) -> None:
    source = write_hf(tmp_path / "hf", tiny(architecture, tied=False))
    folder = import_model(str(source), tmp_path / "model")
    write_gguf(folder / "base.dat", folder, tmp_path / "x.gguf")
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp_probe.py")), str(tmp_path / "x.gguf"), *PROMPTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lm = load(folder / "base.dat", dtype=torch.float32)
    for prompt, found in zip(PROMPTS, json.loads(done.stdout), strict=True):
        ids = lm.encode(prompt)
        assert found["ids"] == ids
        with torch.no_grad():
            logits = lm.module(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert found["next"] == int(logits.argmax())
        assert found["logprob"] == pytest.approx(float(logits.max()), abs=0.05)
