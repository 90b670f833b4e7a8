"""The hostile and broken files of `corpus/`, byte by byte: `python tests/trainer/make_corpus.py` writes them again.

Each case says which error it must raise and at which byte. Nothing here uses the product's own writer.
"""

import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from trainer import dat_errors as err

FOLDER = Path(__file__).parent / "corpus"


class Case(NamedTuple):
    data: bytes
    error: type[err.DatError]
    offset: int | None


def _zip() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("model/data.pkl"), b"x")
    return buffer.getvalue()


A = b"\x01a\x00\x01\x02\x07\x08"  # a: uint8 [2]
B = b"\x01b\x06\x00\x00\x00\x80\x3f"  # b: float32 [], 1.0
GOOD = b"\x02" + A + B
HUGE = b"\xff" * 8 + b"\x7f"  # 2^63 - 1
SAFETENSORS = struct.pack("<Q", 59) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}     ' + b"\0" * 4

CASES: dict[str, Case] = {
    # cut short
    "empty": Case(b"", err.TruncatedError, 0),
    "cut-in-count": Case(b"\x82", err.TruncatedError, 0),
    "cut-after-count": Case(b"\x01", err.TruncatedError, 1),
    "cut-in-name-length": Case(b"\x01\x81", err.TruncatedError, 1),
    "cut-in-name": Case(b"\x01\x05abc", err.TruncatedError, 2),
    "cut-after-name": Case(b"\x01\x01a", err.TruncatedError, 3),
    "cut-in-type": Case(b"\x01\x01a\xe4", err.TruncatedError, 3),
    "cut-after-type": Case(b"\x01\x01a\x06", err.TruncatedError, 4),
    "cut-in-dims": Case(b"\x01\x01a\x06\x02\x02", err.TruncatedError, 6),
    "cut-in-dim": Case(b"\x01\x01a\x06\x01\xff", err.TruncatedError, 5),
    "cut-in-data": Case(b"\x01\x01a\x06\x01\x02" + b"\0" * 7, err.DataTruncatedError, 6),
    "cut-before-data": Case(b"\x01\x01a\x00\x00", err.DataTruncatedError, 5),
    "cut-second-entry": Case(GOOD[:-1], err.DataTruncatedError, 12),
    "count-one-too-many": Case(b"\x03" + A + B, err.TruncatedError, 16),
    # numbers
    "padded-count": Case(b"\x82\x00" + A + B, err.NonMinimalNumberError, 0),
    "padded-zero": Case(b"\x80\x00", err.NonMinimalNumberError, 0),
    "padded-name-length": Case(b"\x01\x81\x80\x00a\x00\x00\x07", err.NonMinimalNumberError, 1),
    "padded-type": Case(b"\x01\x01a\x86\x00\x00\0\0\0\0", err.NonMinimalNumberError, 3),
    "padded-dim": Case(b"\x01\x01a\x00\x01\x82\x00\x07\x08", err.NonMinimalNumberError, 5),
    "count-of-64-bits": Case(b"\xff" * 9 + b"\x01", err.NumberTooLargeError, 0),
    "name-length-of-70-bits": Case(b"\x01" + b"\x80" * 9 + b"\x01", err.NumberTooLargeError, 1),
    "dim-without-end": Case(b"\x01\x01a\x00\x01" + b"\xff" * 64, err.NumberTooLargeError, 5),
    "count-huge": Case(HUGE + A, err.TooManyEntriesError, 0),
    "count-over-limit": Case(b"\x81\x80\x10" + A, err.TooManyEntriesError, 0),
    # names
    "name-empty": Case(b"\x01\x00\x00\x00\x07", err.EmptyNameError, 2),
    "name-length-huge": Case(b"\x01" + HUGE + b"a", err.NameTooLongError, 1),
    "name-of-4097": Case(b"\x01\x81\x20" + b"a" * 4097 + b"\x00\x00\x07", err.NameTooLongError, 1),
    "name-not-utf8": Case(b"\x01\x02a\xff\x00\x00\x07", err.NameNotUtf8Error, 2),
    "name-half-character": Case(b"\x01\x02\xe7\xa5\x00\x00\x07", err.NameNotUtf8Error, 2),
    "name-surrogate": Case(b"\x01\x03\xed\xa0\x80\x00\x00\x07", err.NameNotUtf8Error, 2),
    "name-overlong-nul": Case(b"\x01\x02\xc0\x80\x00\x00\x07", err.NameNotUtf8Error, 2),
    "name-twice": Case(b"\x02" + A + A, err.DuplicateNameError, 13),
    # types and shapes
    "type-8": Case(b"\x01\x01a\x08\x00\0\0\0\0", err.UnknownScalarTypeError, 3),
    "type-102": Case(b"\x01\x01a\x66\x00\0", err.UnknownScalarTypeError, 3),
    "type-huge": Case(b"\x01\x01a" + HUGE + b"\x00\0", err.UnknownScalarTypeError, 3),
    "dims-65": Case(b"\x01\x01a\x00\x41" + b"\x01" * 65 + b"\0", err.TooManyDimensionsError, 4),
    "dims-huge": Case(b"\x01\x01a\x00" + HUGE + b"\0", err.TooManyDimensionsError, 4),
    "shape-overflows": Case(b"\x01\x01a\x06\x02" + HUGE + HUGE, err.ShapeOverflowError, 5),
    "shape-overflows-to-8": Case(  # 2^32 x (2^32 + 1) x 8 wraps to a small number in 64 bits
        b"\x01\x01a\x07\x02\x80\x80\x80\x80\x10\x81\x80\x80\x80\x10" + b"\0" * 16, err.ShapeOverflowError, 5
    ),
    "shape-overflows-by-itemsize": Case(b"\x01\x01a\x06\x01" + HUGE, err.ShapeOverflowError, 5),
    "shape-hidden-by-zero": Case(b"\x01\x01a\x00\x03" + HUGE + HUGE + b"\x00", err.ShapeOverflowError, 5),
    "shape-of-terabytes": Case(b"\x01\x01a\x06\x01\x80\x80\x80\x80\x80\x40" + b"\0" * 8, err.DataTruncatedError, 11),
    # what follows
    "trailing-byte": Case(GOOD + b"\0", err.TrailingBytesError, 16),
    "two-files-joined": Case(GOOD + GOOD, err.TrailingBytesError, 16),
    "count-zero-with-entries": Case(b"\x00" + A, err.TrailingBytesError, 1),
    # other formats under this name
    "zip": Case(_zip(), err.ForeignFileError, 0),
    "gguf": Case(b"GGUF\x03\0\0\0" + b"\0" * 16, err.ForeignFileError, 0),
    "safetensors": Case(SAFETENSORS, err.ForeignFileError, 0),
    "pickle": Case(b"\x80\x02}q\x00.", err.ForeignFileError, 0),
    "bare-tensor": Case(b"\x06\x01\x02" + b"\0\0\x80\x3f" * 2, err.ForeignFileError, 0),
    "text": Case(b"not weights at all\n", err.TruncatedError, 2),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, case in CASES.items():
        (FOLDER / f"{name}.dat").write_bytes(case.data)


if __name__ == "__main__":
    main()
