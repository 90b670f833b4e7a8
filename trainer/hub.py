"""A checkpoint of the Hugging Face hub, by its id, on this machine.

    folder, revision = fetch("org/name", None)

Everything goes through huggingface_hub: its cache, its token and its endpoint settings (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE) count as they do elsewhere. Fetched are the configuration, the tokenizer and safetensors: no pickles, no
code. The configuration comes first, so that a model which cannot be imported costs no download.
"""

from __future__ import annotations

import re
from pathlib import Path

from trainer.transfer import TEXT_FILES, TransferError, check_model_type, read_json

PATTERNS = [
    "config.json",
    *TEXT_FILES,
    "tokenizer.model",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
]


def fetch(name: str, revision: str | None) -> tuple[Path, str]:
    """(folder in the hub's cache, commit) of ``name`` at a branch, tag or commit (default: main). Raises TransferError.

    Files that the cache already has are not fetched again; without a connection the cache alone answers.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"]))
        if not (folder / "config.json").is_file():
            raise TransferError(f"{name}: no config.json in it: not a checkpoint that can be imported")
        check_model_type(Path(name) / "config.json", read_json(folder / "config.json"))
        commit = folder.name  # of the very same state, should the branch move meanwhile
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=PATTERNS))
    except TransferError:
        raise
    except Exception as error:  # the hub's, its HTTP library's and the file system's: they share no class
        raise TransferError(_why(f"{name}@{revision}" if revision else name, error)) from error
    return folder, commit


def _why(name: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"{name}: the hub asks for an accepted licence (gated model): accept it there and set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: the hub knows no such revision"
    if status in (401, 403):
        return f"{name}: the hub refuses access ({status}): no such model, or a private one; check HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name}: the hub knows no such model, or it is private: check the name and HF_TOKEN"
    if constants.HF_HUB_OFFLINE:
        return f"{name}: not in the cache, and HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{name}: the hub at {constants.ENDPOINT} cannot be reached, and the cache does not hold the model"
    said = " ".join(re.sub(r"\(Request ID[^)]*\)", "", str(error)).split())
    return f"{name}: the hub at {constants.ENDPOINT} failed: {said or type(error).__name__}"
