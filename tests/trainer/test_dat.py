import gc
import os
import resource
import signal
import struct
from pathlib import Path

import make_corpus
import pytest
import torch

from trainer import dat_errors as err
from trainer.dat import DatError, DatReader, DatWriter, ScalarType, copy_entry

EVERY_TYPE = {
    ScalarType.UINT8: ("B", 200),
    ScalarType.INT8: ("b", -3),
    ScalarType.INT16: ("<h", -300),
    ScalarType.INT32: ("<i", -70000),
    ScalarType.INT64: ("<q", -(2**40)),
    ScalarType.FLOAT16: ("<e", 1.5),
    ScalarType.FLOAT32: ("<f", -2.5),
    ScalarType.FLOAT64: ("<d", 0.1),
    ScalarType.COMPLEX64: ("<2f", 1 - 2j),
    ScalarType.COMPLEX128: ("<2d", 1 - 2j),
    ScalarType.BOOL: ("?", True),
    ScalarType.BFLOAT16: ("<H", 1.0),
    ScalarType.FLOAT4_PACKED: ("B", 0x7F),
    ScalarType.FLOAT8_E4M3FN: ("B", 448.0),
}
BITS = {ScalarType.BFLOAT16: 0x3F80, ScalarType.FLOAT8_E4M3FN: 0x7E}


def packed(scalar_type: ScalarType) -> bytes:
    code, value = EVERY_TYPE[scalar_type]
    if isinstance(value, complex):
        return struct.pack(code, value.real, value.imag)
    return struct.pack(code, BITS.get(scalar_type, value))


def golden() -> bytes:
    """A file with every scalar type, spelt out here and not by the product."""
    parts = [bytes([len(EVERY_TYPE) + 1])]
    for scalar_type in EVERY_TYPE:
        name = f"層.{scalar_type.name}".encode()
        parts += [bytes([len(name)]), name, bytes([scalar_type, 2, 1, 2]), packed(scalar_type) * 2]
    parts.append(b"\x03\xe7\xa5\x9e\x06\x00" + struct.pack("<f", 3.25))
    return b"".join(parts)


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def rewrite(source: Path, target: Path) -> None:
    with DatReader(source) as reader, DatWriter(target, len(reader.entries)) as writer:
        for name in reader.entries:
            copy_entry(reader, writer, name)


def test_golden_file_is_read_and_rewritten_byte_for_byte(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dat", golden())
    with DatReader(path) as reader:
        assert list(reader.entries) == [f"層.{t.name}" for t in EVERY_TYPE] + ["神"]
        for scalar_type, (_, value) in EVERY_TYPE.items():
            entry = reader.entries[f"層.{scalar_type.name}"]
            assert (entry.scalar_type, entry.shape, entry.nbytes) == (scalar_type, (1, 2), 2 * scalar_type.itemsize)
            assert golden()[entry.offset :].startswith(packed(scalar_type) * 2)
            tensor = reader.tensor(entry.name)
            assert tensor.dtype == scalar_type.dtype
            assert tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).tolist() == [[value, value]]
            assert bytes(reader.raw(entry.name)) == packed(scalar_type) * 2
        assert reader.entries["神"].shape == ()
        assert reader.tensor("神").item() == 3.25
    rewrite(path, tmp_path / "b.dat")
    assert (tmp_path / "b.dat").read_bytes() == golden()


def test_written_tensors_give_the_golden_bytes(tmp_path: Path) -> None:
    reader = DatReader(save(tmp_path / "a.dat", golden()))
    with DatWriter(tmp_path / "b.dat", len(reader.entries)) as writer:
        for name, entry in reader.entries.items():
            writer.write(name, reader.tensor(name), entry.scalar_type)
    assert (tmp_path / "b.dat").read_bytes() == golden()


def test_item_sizes_are_those_of_the_format() -> None:
    sizes = {0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 8, 9: 8, 10: 16, 11: 1, 15: 2, 100: 1, 101: 1}
    assert {int(t): t.itemsize for t in ScalarType} == sizes


@pytest.mark.parametrize("name", make_corpus.CASES)
def test_corpus(name: str) -> None:
    case = make_corpus.CASES[name]
    path = make_corpus.FOLDER / f"{name}.dat"
    assert path.read_bytes() == case.data, "run make_corpus.py"
    with pytest.raises(case.error) as caught:
        DatReader(path)
    assert type(caught.value) is case.error
    assert caught.value.offset == case.offset
    assert f"byte {case.offset}" in str(caught.value)
    assert caught.value.entry is None or repr(caught.value.entry) in str(caught.value)


def test_corpus_is_complete() -> None:
    assert len(make_corpus.CASES) >= 30
    assert {path.stem for path in make_corpus.FOLDER.iterdir()} == set(make_corpus.CASES)
    # Each rule of a file's bytes has a case; the others are rules of paths, of values, and of writing.
    values = {err.InvalidBoolError, err.NonFiniteValueError, err.NegativeScaleError}
    elsewhere = {err.NotAFileError, err.PairError, err.EntryCountError, err.EntryDataError} | values
    assert {case.error for case in make_corpus.CASES.values()} == set(rules(DatError)) - elsewhere


def rules(error: type[DatError]) -> list[type[DatError]]:
    return [each for sub in error.__subclasses__() for each in (sub, *rules(sub))]


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    data = golden()
    for length in range(len(data)):
        with pytest.raises(err.TruncatedError):
            DatReader(save(tmp_path / "a.dat", data[:length]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("zip", "zip"), ("gguf", "GGUF"), ("safetensors", "safetensors"), ("pickle", "pickle"), ("bare-tensor", "single")],
)
def test_a_foreign_file_is_called_by_its_name(name: str, kind: str) -> None:
    with pytest.raises(err.ForeignFileError, match=kind):
        DatReader(make_corpus.FOLDER / f"{name}.dat")


def test_a_valid_file_that_starts_like_a_foreign_one_is_read(tmp_path: Path) -> None:
    entries = [(f"\x03\x04{index:073}".encode(), index) for index in range(0x50)]
    data = b"P" + b"".join(b"K" + name + b"\x00\x00" + bytes([value]) for name, value in entries)
    assert data.startswith(b"PK\x03\x04")
    assert len(DatReader(save(tmp_path / "a.dat", data)).entries) == 0x50


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.dat")
    for path in (tmp_path, tmp_path / "pipe.dat"):
        with pytest.raises(err.NotAFileError):
            DatReader(path)
    with pytest.raises(FileNotFoundError):
        DatReader(tmp_path / "none.dat")


def test_a_claim_allocates_nothing(tmp_path: Path) -> None:
    # A terabyte that is really there, in a sparse file: accepted, and still nothing is read or allocated.
    path = save(tmp_path / "a.dat", b"\x01\x01a\x00\x01\x80\x80\x80\x80\x80\x20")
    os.truncate(path, 11 + (1 << 40))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with DatReader(path) as reader:
        assert reader.tensor("a").shape == (1 << 40,)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16


def test_tensors_share_the_mapping_outlive_the_reader_and_never_write_to_the_file(tmp_path: Path) -> None:
    data = b"\x01\x01a\x00\x01\x04" + b"\1\2\3\4"
    path = save(tmp_path / "a.dat", data)
    with DatReader(path) as reader:
        first, second, raw = reader.tensor("a"), reader.tensor("a"), reader.raw("a")
        assert first.data_ptr() == second.data_ptr()
        assert raw.readonly
    with pytest.raises(ValueError, match="closed"):
        reader.tensor("a")
    del reader, second
    gc.collect()
    first[0] = 9
    assert first.tolist() == [9, 2, 3, 4]
    assert path.read_bytes() == data


def test_misaligned_data_is_copied(tmp_path: Path) -> None:
    for pad in range(1, 9):
        name = b"n" * pad
        data = b"\x01" + bytes([pad]) + name + b"\x07\x01\x01" + struct.pack("<d", 0.1)
        tensor = DatReader(save(tmp_path / "a.dat", data)).tensor(name.decode())
        assert tensor.data_ptr() % 8 == 0
        assert tensor.item() == 0.1


def test_empty_tensors(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dat", b"\x01\x01a\x06\x02\x00\x05")
    with DatReader(path) as reader:
        assert reader.tensor("a").shape == (0, 5)
        assert len(reader.raw("a")) == 0
    rewrite(path, tmp_path / "b.dat")
    assert (tmp_path / "b.dat").read_bytes() == path.read_bytes()
    with DatReader(save(tmp_path / "c.dat", b"\x00")) as reader:
        assert reader.entries == {}


def test_a_bool_of_two_is_refused(tmp_path: Path) -> None:
    with DatReader(save(tmp_path / "a.dat", b"\x01\x01a\x0b\x01\x02\x01\x02")) as reader:
        with pytest.raises(err.InvalidBoolError):
            reader.tensor("a")
        assert bytes(reader.raw("a")) == b"\x01\x02"


# Pairs


def write_pairs(path: Path, entries: dict[str, tuple[ScalarType, tuple[int, ...]]]) -> DatReader:
    with DatWriter(path, len(entries)) as writer:
        for name, (scalar_type, shape) in entries.items():
            writer.write(name, torch.zeros(shape).to(scalar_type.dtype), scalar_type)
    return DatReader(path)


Q, P, S = ScalarType.UINT8, ScalarType.FLOAT4_PACKED, ScalarType.FLOAT8_E4M3FN


def test_pairs_of_both_key_styles(tmp_path: Path) -> None:
    entries = {
        "a.weight.qdata": (Q, (3, 16)),
        "a.weight.scale": (S, (3, 2)),
        "norm.weight": (ScalarType.FLOAT16, (32,)),
        "b.scale": (ScalarType.FLOAT16, (4, 1)),  # before its qdata, of an older type
        "b.qdata": (P, (4, 8)),
        "rope.scale": (ScalarType.FLOAT32, ()),  # a parameter of that name is no pair
    }
    pairs = write_pairs(tmp_path / "a.dat", entries).pairs()
    assert {name: pair.shape for name, pair in pairs.items()} == {"a.weight": (3, 32), "b.weight": (4, 16)}
    assert pairs["b.weight"].qdata.name == "b.qdata"
    assert pairs["b.weight"].scale.name == "b.scale"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a.qdata": (Q, (3, 16))}, "without its scale"),
        ({"a.weight.qdata": (Q, (3, 16)), "a.scale": (S, (3, 2))}, "without its"),
        ({"a.scale": (S, (3, 2))}, "without its qdata"),
        ({"a.qdata": (ScalarType.INT8, (3, 16)), "a.scale": (S, (3, 2))}, "qdata of INT8"),
        ({"a.qdata": (Q, (3, 16)), "a.scale": (ScalarType.BFLOAT16, (3, 2))}, "scales of BFLOAT16"),
        ({"a.qdata": (Q, (3, 12)), "a.scale": (S, (3, 1))}, "multiple of 8"),
        ({"a.qdata": (Q, (48,)), "a.scale": (S, (6,))}, "multiple of 8"),
        ({"a.qdata": (Q, (3, 16)), "a.scale": (S, (2, 3))}, "scales of shape"),
        ({"a.qdata": (Q, (3, 16)), "a.scale": (S, (3, 2)), "a.weight": (S, (3, 2))}, "stored twice"),
    ],
)
def test_odd_pairs(tmp_path: Path, entries: dict[str, tuple[ScalarType, tuple[int, ...]]], message: str) -> None:
    reader = write_pairs(tmp_path / "a.dat", entries)
    with pytest.raises(err.PairError, match=message) as caught:
        reader.pairs()
    assert caught.value.entry in entries
    assert len(reader.pair_problems()) >= 1


def test_both_styles_of_one_weight_are_refused(tmp_path: Path) -> None:
    half = {"qdata": (Q, (3, 16)), "scale": (S, (3, 2))}
    reader = write_pairs(tmp_path / "a.dat", {f"{stem}.{k}": v for stem in ("a", "a.weight") for k, v in half.items()})
    with pytest.raises(err.PairError, match="stored twice"):
        reader.pairs()


# Writing

ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (err.EmptyNameError, ("", ONE, ScalarType.FLOAT32)),
        (err.NameTooLongError, ("神" * 1366, ONE, ScalarType.FLOAT32)),
        (err.NameNotUtf8Error, ("\ud800", ONE, ScalarType.FLOAT32)),
        (err.DuplicateNameError, ("first", ONE, ScalarType.FLOAT32)),
        (err.EntryDataError, ("a", ONE, ScalarType.FLOAT16)),
        (err.EntryDataError, ("a", ONE, ScalarType.FLOAT32, (3,))),
        (err.EntryDataError, ("a", b"\0" * 7, ScalarType.FLOAT32, (2,))),
        (err.EntryDataError, ("a", b"\0" * 8, ScalarType.FLOAT32)),
        (err.EntryDataError, ("a", torch.zeros(2, dtype=torch.int8), ScalarType.FLOAT8_E4M3FN)),
        (err.ShapeOverflowError, ("a", b"", ScalarType.FLOAT32, (1 << 62, 2))),
    ],
)
def test_a_refused_entry_writes_nothing(tmp_path: Path, error: type[DatError], arguments: tuple[object, ...]) -> None:
    with DatWriter(tmp_path / "a.dat", 2) as writer:
        writer.write("first", ONE, ScalarType.FLOAT32)
        with pytest.raises(error) as caught:
            writer.write(*arguments)  # type: ignore[arg-type]
        assert type(caught.value) is error
        writer.write("second", ONE, ScalarType.FLOAT32)
    assert list(DatReader(tmp_path / "a.dat").entries) == ["first", "second"]


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_count_leaves_no_file(tmp_path: Path, count: int) -> None:
    def write() -> None:
        with DatWriter(tmp_path / "a.dat", count) as writer:
            writer.write("a", ONE, ScalarType.FLOAT32)

    with pytest.raises(err.EntryCountError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_count_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(err.TooManyEntriesError):
        DatWriter(tmp_path / "a.dat", (1 << 18) + 1)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dat", golden())

    def write() -> None:
        with DatWriter(path, 1) as writer:
            writer.write("a", ONE, ScalarType.FLOAT32)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == golden()
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_even_if_the_error_is_swallowed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dat", golden())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
        with DatWriter(path, 1) as writer, pytest.raises(OSError, match="large"):
            writer.write("a", torch.zeros(1 << 16), ScalarType.FLOAT32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    with pytest.raises(ValueError, match="closed"):
        writer.write("a", ONE, ScalarType.FLOAT32)
    assert path.read_bytes() == golden()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_be_rewritten_while_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dat", golden())
    with DatReader(path) as reader:
        rewrite(path, path)
        assert reader.tensor("神").item() == 3.25
    assert path.read_bytes() == golden()


def test_strided_conjugate_and_gradient_tensors_are_written_by_value(tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.float32).view(2, 3).requires_grad_()
    wave = torch.tensor([1 + 2j]).conj()
    with DatWriter(tmp_path / "a.dat", 2) as writer:
        writer.write("t", weight.T, ScalarType.FLOAT32)
        writer.write("c", wave, ScalarType.COMPLEX64)
    with DatReader(tmp_path / "a.dat") as reader:
        assert reader.tensor("t").tolist() == [[0, 3], [1, 4], [2, 5]]
        assert reader.tensor("c").tolist() == [1 - 2j]
