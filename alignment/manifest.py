"""What an artifact is: ``x.dat.json`` beside ``x.dat``.

    manifest.write(record, Path("artifacts/demo.dat"), report=Path("reports/run/report.md"))
    manifest.verify(Path("artifacts/demo.dat"))               # the Manifest, or ManifestError
    manifest.model_folder_of(Path("artifacts/demo.dat"), None)

Paths inside are relative to the artifact's folder, so that a tree which holds base, artifact and report can be moved as
a whole. ``read`` checks the form only; ``verify`` also hashes the artifact. Nothing here changes a .dat.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment import disagree
from alignment.gate import EXIT_CODES, Verdict
from alignment.record import RunRecord
from trainer.files import atomic_write, sha256_file

FORMAT = "align-manifest-1"
_SOURCE = Path(__file__).resolve().parent.parent
_UNSAFE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_KINDS: dict[str, type[Any]] = {"bytes": int, "accepted_in_fresh_process": bool}
_KINDS |= dict.fromkeys(("inputs", "config", "environment", "code", "metrics"), dict)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ManifestError(Exception):
    """A manifest that is missing, broken or not this file's; the message says what was found and what to do."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``x.dat.json``, key by key."""

    artifact: str
    """File name when it was written."""
    sha256: str
    bytes: int
    verdict: Verdict
    run: str
    command: str
    started: str
    accepted_in_fresh_process: bool
    base_name: str
    base_sha256: str
    base_path: str
    """Relative to the artifact's folder, as ``model_folder`` and ``report_path``."""
    model_folder: str
    folder_sha256: str
    inputs: dict[str, str]
    """Data files and the spec suite: name to SHA-256."""
    config: dict[str, Any]
    environment: dict[str, Any]
    code: dict[str, Any]
    report_path: str | None
    report_sha256: str | None
    metrics: dict[str, Any]
    """``drift``; under ``specs``, each spec's counts as in the gate; ``numerics``: what decided, and passes in each.
    Empty when there was no final evaluation."""


def path_of(artifact: Path) -> Path:
    """Where the manifest of ``artifact`` lies."""
    return artifact.with_name(artifact.name + ".json")


def write(record: RunRecord, artifact: Path, report: Path | None) -> Path:
    """Write the manifest of ``artifact`` and return its path.

    The artifact and the report are hashed as they lie on disk. Raises ManifestError when the artifact is not the one
    the record speaks of, OSError as the file system reports it.
    """
    digest = sha256_file(artifact)
    recorded = (record.artifact or {}).get("sha256", digest)
    if recorded != digest:
        raise ManifestError(f"{artifact}: sha256 is {digest}, the run recorded {recorded}; export again")
    folder = artifact.parent.resolve()
    manifest = Manifest(
        artifact=artifact.name,
        sha256=digest,
        bytes=artifact.stat().st_size,
        verdict=record.verdict,
        run=record.run,
        command=record.command,
        started=record.started,
        accepted_in_fresh_process=record.accepted_in_fresh_process,
        base_name=str(record.base["name"]),
        base_sha256=str(record.base["sha256"]),
        base_path=_relative(Path(record.base["path"]), folder),
        model_folder=_relative(Path(record.base["folder"]), folder),
        folder_sha256=str(record.base["folder_sha256"]),
        inputs=record.inputs,
        config=record.config,
        environment=record.environment,
        code=record.code,
        report_path=_relative(report, folder) if report else None,
        report_sha256=sha256_file(report) if report else None,
        metrics=_metrics(record),
    )
    with atomic_write(path_of(artifact)) as file:
        file.write(json_bytes({"format": FORMAT, **vars(manifest)}))
    return path_of(artifact)


def _metrics(record: RunRecord) -> dict[str, Any]:
    if record.assessment is None:
        return {}
    specs = {count.spec: {k: v for k, v in vars(count).items() if k != "spec"} for count in record.assessment.specs}
    return {"drift": record.assessment.drift, "specs": specs, **disagree.data(record, cases=False)}


def json_bytes(data: Any) -> bytes:
    """Readable, standard JSON in UTF-8 that a terminal can show.

    JSON knows no NaN: a number that is not finite becomes its name. Text stays as it is but for characters that steer a
    terminal, reverse the reading direction or are half of a pair: those are written as escapes, and read back the same.
    """
    text = json.dumps(_plain(data), ensure_ascii=False, indent=2, allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.resolve(), folder)).as_posix()
    except ValueError:  # Windows: another drive
        return path.resolve().as_posix()


def read(artifact: Path) -> Manifest:
    """The manifest beside ``artifact``, its form checked. Raises ManifestError."""
    path = path_of(artifact)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ManifestError(f"{artifact} has no manifest: {path} does not exist") from error
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON in UTF-8: {error}; `align run` writes it anew") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path}: holds a {type(data).__name__}, not the object of a manifest")
    if data.get("kind") == "base":
        raise ManifestError(f"{path}: is the record of a base, not of an artifact")
    if data.get("format") != FORMAT:
        raise ManifestError(f"{path}: format is {data.get('format')!r}, expected {FORMAT!r}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Manifest):
        if field.name not in data:
            raise ManifestError(f"{path}: key {field.name!r} is missing")
        values[field.name] = _checked(path, field.name, data[field.name])
    return Manifest(**values)


def _checked(path: Path, name: str, value: Any) -> Any:
    if name.startswith("report_") and value is None:
        return None
    wanted = _KINDS.get(name, str)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ManifestError(f"{path}: {name} is {value!r}, expected a {wanted.__name__}")
    if name.endswith("sha256") and not _SHA256.fullmatch(value):
        raise ManifestError(f"{path}: {name} is {value!r}, expected 64 hexadecimal digits")
    if name == "verdict" and value not in EXIT_CODES:
        raise ManifestError(f"{path}: verdict is {value!r}, expected one of {', '.join(EXIT_CODES)}")
    if name == "inputs" and not all(isinstance(v, str) for v in value.values()):
        raise ManifestError(f"{path}: inputs is not a mapping of names to SHA-256")
    return value


def verify(artifact: Path) -> Manifest:
    """The manifest of ``artifact``, if the file is the one it was written for. Raises ManifestError."""
    manifest = read(artifact)
    try:
        got = sha256_file(artifact)
    except OSError as error:
        raise ManifestError(f"{artifact}: cannot be read: {error.strerror}") from error
    if got != manifest.sha256:
        raise ManifestError(
            f"{artifact} is not the file its manifest describes: sha256 is {got}, the manifest says {manifest.sha256}; "
            f"it was changed, cut short or replaced after run {manifest.run}"
        )
    return manifest


def model_folder_of(artifact: Path, explicit: Path | None = None) -> Path:
    """The folder with configuration and tokenizer for ``artifact``.

    ``explicit`` when given, else the artifact's own folder when it holds config.json, else the folder its manifest
    names. Raises ManifestError.
    """
    if explicit is not None:
        if not (explicit / "config.json").is_file():
            raise ManifestError(
                f"{explicit} is not a model folder: no config.json in it; pass another one: --model DIR"
            )
        return explicit
    if (artifact.parent / "config.json").is_file():
        return artifact.parent
    try:
        folder = artifact.parent.resolve() / read(artifact).model_folder
        if (folder / "config.json").is_file():
            return Path(os.path.normpath(folder))
        why = f"the folder its manifest names has none either ({os.path.normpath(folder)})"
    except ManifestError as error:
        why = str(error)
    raise ManifestError(
        f"no model folder for {artifact}: no config.json beside it (in {artifact.parent}), and {why}; "
        f"pass the folder with config.json and tokenizer.json: --model DIR"
    )


def base_of(artifact: Path) -> Path | None:
    """The base .dat that ``artifact`` was trained from.

    None when there is no manifest, when ``artifact`` is itself a base, or when no file lies where the manifest says.
    Raises ManifestError for a broken manifest. The file is not hashed: compare with ``read(artifact).base_sha256``.
    """
    if not path_of(artifact).is_file() or _is_base(artifact):
        return None
    base = artifact.parent.resolve() / read(artifact).base_path
    return Path(os.path.normpath(base)) if base.is_file() else None


def _is_base(artifact: Path) -> bool:
    try:
        data = json.loads(path_of(artifact).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # read() says what is wrong with it
    return isinstance(data, dict) and data.get("kind") == "base"


def environment() -> dict[str, Any]:
    """Where a result was made: versions, platform, device and threads."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def code_revision(root: Path = _SOURCE) -> dict[str, Any]:
    """This package's version, and revision and dirty when ``root`` is a git checkout. Never fails.

    Dirty looks at the code only: data and specs are hashed on their own.
    """
    result: dict[str, Any] = {"version": _version("align-harness")}
    # Only a checkout of its own: inside somebody else's repository (a venv there) git would answer with theirs.
    if not (root / ".git").exists():
        return result
    try:
        revision = _git(root, "rev-parse", "HEAD").strip()
        dirty = bool(_git(root, "status", "--porcelain", "--", "alignment", "trainer", "pyproject.toml").strip())
    except (OSError, subprocess.SubprocessError):
        return result
    return {**result, "revision": revision, "dirty": dirty}


def _git(root: Path, *arguments: str) -> str:
    # GIT_DIR and its kin would point git elsewhere; status must not take the index lock from a person at work.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", timeout=20, check=True)
    return done.stdout
