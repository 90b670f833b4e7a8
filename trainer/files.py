"""The one way this project writes files.

    with atomic_write("report.json", "w") as f:
        f.write(text)

Promises: the path holds either its old content or all of the new one, whatever happens (an exception, an interrupt, a
full disk, a power cut after the call returned); a failed write leaves nothing behind. Does not promise: that a process
killed outright (SIGKILL) removes its temporary file, which is then found beside the target as `.NAME.RANDOM.tmp` and
may be deleted.
"""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Yield a file whose content takes the place of `path` when the block ends, and vanishes when the block raises.

    `"w"` is UTF-8 with `\\n` line ends. A symbolic link is followed: its target is replaced, the link stays. The new
    file has the permissions of the one it replaces, or those the umask gives. Raises `OSError` as the file system
    reports it.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_write replaces whole files: mode must be 'wb' or 'w', not {mode!r}")
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        # "x": never open a file that somebody else put there, not even through a link.
        with temporary.open("xb" if mode == "wb" else "x", **({} if mode == "wb" else _TEXT)) as file:
            with suppress(FileNotFoundError):
                temporary.chmod(target.stat().st_mode & 0o7777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    except BaseException:  # KeyboardInterrupt and SystemExit too: nothing half-written stays
        temporary.unlink(missing_ok=True)
        raise


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in lower-case hexadecimal; reads in small pieces. Raises `OSError`."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_TEXT: dict[str, Any] = {"encoding": "utf-8", "newline": "\n"}


def _sync_folder(folder: Path) -> None:
    """Make the new name durable: without this the rename may be lost in a power cut, though the bytes are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
