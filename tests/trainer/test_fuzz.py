"""The reader under generated files: no crash, no hang, no allocation beyond the file, only the errors it names.

`ALIGN_FUZZ=20000 pytest tests/trainer/test_fuzz.py` looks at more inputs than the few hundred of a usual run, and at
other ones every time.
"""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import make_corpus
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.dat import DatError, DatReader, DatWriter, ScalarType, copy_entry

INPUTS = int(os.environ.get("ALIGN_FUZZ", "0"))
fuzz = settings(
    max_examples=INPUTS or 300,
    derandomize=not INPUTS,
    deadline=None if INPUTS else 5000,  # milliseconds: a hang fails
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def number(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def uleb(top: int) -> st.SearchStrategy[bytes]:
    """Mostly small numbers, sometimes huge, padded or endless ones."""
    small = st.integers(0, top).map(number)
    huge = st.integers(0, 1 << 70).map(number)
    padded = small.map(lambda raw: raw[:-1] + bytes([raw[-1] | 0x80, 0]))
    return st.one_of(small, small, small, small, huge, padded, st.binary(min_size=1, max_size=12))


@st.composite
def file_like(draw: Any) -> bytes:
    """Bytes with the structure of a file and now and then a lie in it."""
    parts = [draw(uleb(5))]
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.one_of(st.text("ab層", min_size=1, max_size=3).map(str.encode), st.binary(max_size=4)))
        parts += [draw(st.one_of(st.just(number(len(name))), uleb(6))), name]
        parts.append(draw(st.one_of(st.sampled_from(list(ScalarType)).map(number), uleb(120))))
        dims = draw(st.lists(st.integers(0, 4), max_size=3))
        parts += [draw(st.one_of(st.just(number(len(dims))), uleb(70)))]
        parts += [draw(st.one_of(st.just(number(dim)), uleb(9))) for dim in dims]
        parts.append(draw(st.binary(max_size=40)))
    return b"".join(parts)


def check(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        reader = DatReader(path)
    except DatError as error:
        refusal: DatError | None = error
    else:
        refusal = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Objects for the entries and an error's text; nothing of the size that a file may claim.
        assert peak < 100_000 + 400 * len(data), peak
    if refusal:
        assert refusal.offset is not None
        assert 0 <= refusal.offset <= len(data)
        assert str(refusal)
        return
    end = 0
    for name, entry in reader.entries.items():
        assert end < entry.offset <= entry.offset + entry.nbytes <= len(data)
        end = entry.offset + entry.nbytes
        assert bytes(reader.raw(name)) == data[entry.offset : end]
        try:
            assert reader.tensor(name).shape == entry.shape
        except DatError:
            assert entry.scalar_type == ScalarType.BOOL
    assert end == len(data) or not reader.entries
    assert all(isinstance(problem, DatError) for problem in reader.pair_problems())
    copy = path.with_suffix(".copy")
    with DatWriter(copy, len(reader.entries)) as writer:
        for name in reader.entries:
            copy_entry(reader, writer, name)
    assert copy.read_bytes() == data


@fuzz
@given(file_like())
def test_structured_bytes(tmp_path: Path, data: bytes) -> None:
    check(tmp_path / "a.dat", data)


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    check(tmp_path / "a.dat", data)


@fuzz
@given(st.sampled_from(sorted(make_corpus.CASES)), st.data())
def test_mutations_of_the_corpus(tmp_path: Path, name: str, data: st.DataObject) -> None:
    raw = bytearray(make_corpus.CASES[name].data[:300])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    check(tmp_path / "a.dat", bytes(raw))


@st.composite
def tensors(draw: Any) -> tuple[bytes, ScalarType, tuple[int, ...]]:
    scalar_type = draw(st.sampled_from(list(ScalarType)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    nbytes = torch.Size(shape).numel() * scalar_type.itemsize
    return draw(st.binary(min_size=nbytes, max_size=nbytes)), scalar_type, shape


@fuzz
@given(st.dictionaries(st.text(min_size=1, max_size=20), tensors(), max_size=5))
def test_every_valid_file_comes_back(
    tmp_path: Path, entries: dict[str, tuple[bytes, ScalarType, tuple[int, ...]]]
) -> None:
    path = tmp_path / "a.dat"
    with DatWriter(path, len(entries)) as writer:
        for name, (data, scalar_type, shape) in entries.items():
            writer.write(name, data, scalar_type, shape)
    with DatReader(path) as reader:
        assert list(reader.entries) == list(entries)
        for name, (data, scalar_type, shape) in entries.items():
            assert bytes(reader.raw(name)) == data
            assert (reader.entries[name].scalar_type, reader.entries[name].shape) == (scalar_type, shape)
    check(path, path.read_bytes())
