"""The `.dat` container: a state dict as TorchSharp writes it, read safely and written atomically.

    with DatReader("base.dat") as reader, DatWriter("new.dat", count=len(reader.entries)) as writer:
        for name in reader.entries:
            copy_entry(reader, writer, name)

Layout (little-endian, no magic, version, padding or checksum; `uleb` is an unsigned LEB128 number):

    uleb entry count
    per entry: uleb name length in bytes | UTF-8 name | uleb scalar type | uleb ndim | ndim x uleb dim | data

Promises: opening checks every header of the file before anything is handed out, and allocates nothing on the file's
say-so; each broken rule has its own error (`trainer.dat_errors`); a file that is read and written again is the same,
byte for byte; a writer leaves a whole file or none. Does not promise: anything about a file that another program
shortens in place while it is open (this project's writers never do: they replace), nor about the values of the data.
For little-endian machines.
"""

import mmap
import os
import stat
import sys
import types
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

import torch

from trainer import dat_errors as err
from trainer.dat_errors import DatError
from trainer.dat_format import MAX_ENTRIES, Entry, ScalarType, check_name, count_bytes, parse, uleb
from trainer.dat_pairs import Pair, find_pairs
from trainer.files import atomic_write

__all__ = ["DatError", "DatReader", "DatWriter", "Entry", "Pair", "ScalarType", "copy_entry"]

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # named since Python 3.13

_MADV_POPULATE_READ = 22


class DatReader:
    """A memory-mapped `.dat` file whose headers have all been checked. Raises `DatError`, or `OSError` from opening.

    Tensors and views keep the mapping alive: they stay valid after `close`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not stat.S_ISREG(self.path.stat().st_mode):  # before opening: a pipe would block for ever
            raise err.NotAFileError(f"{self.path} is not a regular file", advice="Name a .dat file")
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # A private mapping is writable, so torch wraps it without a copy or a warning, yet no write reaches the
            # file. NORESERVE: the file may be larger than memory.
            flags, prot = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            self._map = mmap.mmap(file.fileno(), size, flags=flags, prot=prot) if size else None
        self._view: memoryview | None = memoryview(self._map or b"")
        try:
            self.entries: dict[str, Entry] = parse(self._view)
        except DatError as error:
            error.path = self.path
            raise
        """Every entry by name, in file order."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapping; the system frees it when the last tensor made from it is gone."""
        self._view = self._map = None

    def prefetch(self, name: str) -> None:
        """Bring an entry's pages in at once: whoever then reads all of it need not stop at every page. Never needed."""
        entry = self.entries[name]
        start = entry.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if sys.platform == "linux" and self._map is not None and entry.nbytes:
            with suppress(OSError):  # a kernel before 5.14
                self._map.madvise(_MADV_POPULATE_READ, start, entry.offset + entry.nbytes - start)

    def raw(self, name: str) -> memoryview:
        """The bytes of an entry, read-only and without a copy. Raises `KeyError` for an unknown name."""
        return self._slice(self.entries[name]).toreadonly()

    def tensor(self, name: str, *, device: torch.device | str | None = None) -> torch.Tensor:
        """The entry as a tensor of its shape and `ScalarType.dtype`; `KeyError` for an unknown name.

        On the CPU it shares memory with the mapped file, except where its data is not aligned for its type: then it is
        a copy. Treat it as read-only: writes change this process's view of the file, never the file. With a `device`,
        the bytes go there directly. Raises `InvalidBoolError` for bool data other than 0 and 1, which would be
        undefined behaviour further on.
        """
        entry, dtype = self.entries[name], self.entries[name].scalar_type.dtype
        flat = self.flat(name)
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype, device=device)
        if dtype is torch.bool and int(flat.max()) > 1:
            raise err.InvalidBoolError(
                "a bool is neither 0 nor 1", entry=name, offset=entry.offset, advice="Make the file again"
            )
        if device is not None and torch.device(device).type != "cpu":
            flat = flat.to(device)
        elif flat.data_ptr() % max(1, dtype.itemsize // (2 if dtype.is_complex else 1)):
            flat = flat.clone()  # compiled loops may assume aligned elements
        return flat.view(dtype).view(entry.shape)

    def flat(self, name: str) -> torch.Tensor:
        """The bytes of an entry, uint8 [nbytes], on the CPU and without a copy. `KeyError` for an unknown name."""
        entry = self.entries[name]
        data = self._slice(entry)
        return torch.frombuffer(data, dtype=torch.uint8) if entry.nbytes else torch.empty(0, dtype=torch.uint8)

    def pairs(self) -> dict[str, Pair]:
        """The NVFP4 weights by weight name, in the order of their qdata. Raises the first of `pair_problems`."""
        pairs, problems = self._found
        if problems:
            problems[0].path = self.path
            raise problems[0]
        return pairs

    def pair_problems(self) -> list[DatError]:
        """What keeps entries named like NVFP4 pairs from being such: no partner, wrong type, shapes that do not fit."""
        return list(self._found[1])

    @cached_property
    def _found(self) -> tuple[dict[str, Pair], list[DatError]]:
        return find_pairs(self.entries)

    def _slice(self, entry: Entry) -> memoryview:
        if self._view is None:
            raise ValueError(f"{self.path} was closed: read inside the `with` block")
        return self._view[entry.offset : entry.offset + entry.nbytes]


class DatWriter:
    """Writes a `.dat` file entry by entry, holding one tensor at a time; the path changes only when `close` succeeds.

    As a context manager it closes at the end of the block and discards everything when the block raises. `close` raises
    `EntryCountError`, and leaves no file, when the number of entries is not the announced `count`.
    """

    def __init__(self, path: str | os.PathLike[str], count: int) -> None:
        if not 0 <= count <= MAX_ENTRIES:
            raise err.TooManyEntriesError(f"{count} entries; the format's limit here is {MAX_ENTRIES}")
        self.path, self._count, self._names = Path(path), count, set[str]()
        self._opened: AbstractContextManager[IO[Any]] | None = atomic_write(path)
        self._file: IO[bytes] = self._opened.__enter__()
        self._file.write(uleb(count))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._finish(error)

    def write(
        self,
        name: str,
        data: torch.Tensor | bytes | bytearray | memoryview,
        scalar_type: ScalarType,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Append one entry. A tensor must have the scalar type's dtype (uint8 also stands for types 100 and 101).

        `shape` defaults to the tensor's own and is needed with bytes. Nothing is cast. Raises a `DatError` before a
        byte is written; after an `OSError` the writer only discards.
        """
        if self._opened is None:
            raise ValueError(f"{self.path}: the writer is closed")
        scalar_type = ScalarType(scalar_type)
        if shape is None:
            if not isinstance(data, torch.Tensor):
                raise err.EntryDataError("bytes need a shape", entry=name)
            shape = tuple(data.shape)
        encoded = name.encode("utf-8", "surrogatepass")
        check_name(encoded, name, None)
        if name in self._names:
            raise err.DuplicateNameError("written twice", entry=name, advice="Write each entry once")
        if len(self._names) == self._count:
            raise err.EntryCountError(f"{self._count} entries were announced; this is one more", entry=name)
        nbytes = count_bytes(scalar_type, shape, name, None)
        raw = _tensor_bytes(data, scalar_type, name) if isinstance(data, torch.Tensor) else memoryview(data).cast("B")
        if len(raw) != nbytes:
            raise err.EntryDataError(f"{len(raw)} bytes for shape {shape} of {scalar_type.name}: {nbytes}", entry=name)
        header = [uleb(len(encoded)), encoded, *map(uleb, (scalar_type, len(shape), *shape))]
        try:
            self._file.write(b"".join(header))
            self._file.write(raw)
        except BaseException as error:
            self._finish(error)
            raise
        self._names.add(name)

    def close(self) -> None:
        """Make the file appear under its name. Raises `EntryCountError`; closing twice is harmless."""
        if self._opened is None:
            return
        if len(self._names) != self._count:
            error = err.EntryCountError(
                f"{self.path}: {self._count} entries were announced and {len(self._names)} written",
                advice="No file was made",
            )
            self._finish(error)
            raise error
        self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        opened, self._opened = self._opened, None
        if opened is None:
            return
        opened.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)


def copy_entry(reader: DatReader, writer: DatWriter, name: str) -> None:
    """Copy one entry byte for byte: name, scalar type, shape and data. Raises `KeyError` or what `DatWriter.write`
    raises.
    """
    entry = reader.entries[name]
    reader.prefetch(name)
    writer.write(name, reader.raw(name), entry.scalar_type, entry.shape)


def _tensor_bytes(tensor: torch.Tensor, scalar_type: ScalarType, name: str) -> memoryview:
    stands_for = scalar_type.itemsize == 1 and scalar_type >= ScalarType.FLOAT4_PACKED and tensor.dtype == torch.uint8
    if tensor.dtype != scalar_type.dtype and not stands_for:
        raise err.EntryDataError(
            f"a tensor of {tensor.dtype} as {scalar_type.name}",
            entry=name,
            advice="Convert it first: nothing is cast here",
        )
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data.cast("B")
