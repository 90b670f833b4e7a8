"""The rules of the `.dat` container: scalar types, headers and shapes. `trainer.dat` is the way in.

Every number of a header is checked before it is used, and a claim is compared with the bytes that are left before
anything is allocated. A file that breaks a rule is looked at once more, to say which other format it is.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch

from trainer import dat_errors as err
from trainer.dat_errors import DatError

MAX_ENTRIES = 1 << 18
"""A mixture of 128 experts in 94 layers has 73,000 entries; each costs a few hundred bytes here, so a claim needs a
limit.
"""
MAX_NAME_BYTES = 4096
MAX_DIMS = 64


class ScalarType(IntEnum):
    """The ids of the format. 100 and 101 are the NVFP4 extensions, one byte an element."""

    UINT8 = 0
    INT8 = 1
    INT16 = 2
    INT32 = 3
    INT64 = 4
    FLOAT16 = 5
    FLOAT32 = 6
    FLOAT64 = 7
    COMPLEX64 = 9
    COMPLEX128 = 10
    BOOL = 11
    BFLOAT16 = 15
    FLOAT4_PACKED = 100
    FLOAT8_E4M3FN = 101

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that holds these elements; packed 4-bit floats are plain bytes."""
        return _DTYPES[self]

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return _DTYPES[self].itemsize


_DTYPES = {
    ScalarType.UINT8: torch.uint8,
    ScalarType.INT8: torch.int8,
    ScalarType.INT16: torch.int16,
    ScalarType.INT32: torch.int32,
    ScalarType.INT64: torch.int64,
    ScalarType.FLOAT16: torch.float16,
    ScalarType.FLOAT32: torch.float32,
    ScalarType.FLOAT64: torch.float64,
    ScalarType.COMPLEX64: torch.complex64,
    ScalarType.COMPLEX128: torch.complex128,
    ScalarType.BOOL: torch.bool,
    ScalarType.BFLOAT16: torch.bfloat16,
    ScalarType.FLOAT4_PACKED: torch.uint8,
    ScalarType.FLOAT8_E4M3FN: torch.float8_e4m3fn,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor of a file, as its header describes it."""

    name: str
    scalar_type: ScalarType
    shape: tuple[int, ...]
    offset: int
    """Where the data starts, in bytes from the start of the file."""
    nbytes: int
    """Length of the data; its elements are in C order."""


def parse(view: memoryview) -> dict[str, Entry]:
    """All entries of a whole file, in order. Raises the error of the first rule that the file breaks."""
    try:
        return _parse(view)
    except DatError as error:
        found = _foreign(view)
        if found is None:
            raise
        raise err.ForeignFileError(
            f"this is {found[0]}, not a state dict in .dat form", offset=0, advice=found[1]
        ) from error


def _parse(view: memoryview) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    count, at = _number(view, 0, None, "the entry count")
    if count > MAX_ENTRIES:
        raise err.TooManyEntriesError(
            f"{count} entries claimed; at most {MAX_ENTRIES} are read", offset=0, advice=_REMAKE
        )
    for index in range(count):
        entry, at = _entry(view, at, index)
        if entry.name in entries:
            raise err.DuplicateNameError(
                f"the name was used before, for the data at byte {entries[entry.name].offset}",
                entry=entry.name,
                offset=entry.offset,
                advice="Readers disagree on which one counts: remove one",
            )
        entries[entry.name] = entry
    if at != len(view):
        raise err.TrailingBytesError(
            f"{len(view) - at} bytes follow the last of {count} entries",
            offset=at,
            advice="The count is wrong or two files were joined; " + _REMAKE.lower(),
        )
    return entries


def _entry(view: memoryview, at: int, index: int) -> tuple[Entry, int]:
    label, start = f"#{index}", at
    length, at = _number(view, at, label, "the name's length")
    if length > MAX_NAME_BYTES:  # before slicing: the claim may be anything
        raise err.NameTooLongError(
            f"a name of {length} bytes; at most {MAX_NAME_BYTES} are allowed", entry=label, offset=start, advice=_REMAKE
        )
    if length > len(view) - at:
        raise err.TruncatedError(
            f"the name takes {length} bytes and {len(view) - at} are left", entry=label, offset=at, advice=_FETCH
        )
    encoded = bytes(view[at : at + length])
    name = check_name(encoded, label, at)
    start, at = at + length, at + length
    type_id, at = _number(view, at, name, "the scalar type")
    if type_id not in _IDS:
        raise err.UnknownScalarTypeError(
            f"scalar type {type_id} is unknown; the format has {sorted(_IDS)}", entry=name, offset=start, advice=_REMAKE
        )
    scalar_type, start = ScalarType(type_id), at
    ndim, at = _number(view, at, name, "the number of dimensions")
    if ndim > MAX_DIMS:
        raise err.TooManyDimensionsError(
            f"{ndim} dimensions; at most {MAX_DIMS}", entry=name, offset=start, advice=_REMAKE
        )
    start, dims = at, []
    for axis in range(ndim):
        dim, at = _number(view, at, name, f"dimension {axis}")
        dims.append(dim)
    nbytes = count_bytes(scalar_type, tuple(dims), name, start)
    if nbytes > len(view) - at:
        raise err.DataTruncatedError(
            f"shape {tuple(dims)} of {scalar_type.name} takes {nbytes} bytes and {len(view) - at} are left",
            entry=name,
            offset=at,
            advice=_FETCH,
        )
    return Entry(name=name, scalar_type=scalar_type, shape=tuple(dims), offset=at, nbytes=nbytes), at + nbytes


def check_name(encoded: bytes, label: str, offset: int | None) -> str:
    """The name that these bytes spell; `label` and `offset` are for the errors on names."""
    if not encoded:
        raise err.EmptyNameError("the name is empty", entry=label, offset=offset, advice=_REMAKE)
    if len(encoded) > MAX_NAME_BYTES:
        raise err.NameTooLongError(
            f"a name of {len(encoded)} bytes; at most {MAX_NAME_BYTES}", entry=label, offset=offset
        )
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise err.NameNotUtf8Error(
            f"the name is not UTF-8 ({error.reason} at its byte {error.start})",
            entry=label,
            offset=offset,
            advice=_REMAKE,
        ) from None


def count_bytes(scalar_type: ScalarType, shape: tuple[int, ...], name: str, offset: int | None) -> int:
    """Bytes of a tensor; `name` and `offset` are for the error."""
    # A zero hides the other dimensions from the product, yet strides are computed from them: they have to fit as well.
    largest = nbytes = scalar_type.itemsize
    for dim in shape:
        largest, nbytes = largest * max(dim, 1), nbytes * dim
    if largest >> 63:
        raise err.ShapeOverflowError(f"shape {shape} does not fit 63 bits", entry=name, offset=offset, advice=_REMAKE)
    return nbytes


def uleb(value: int) -> bytes:
    """The one minimal unsigned LEB128 spelling of a number."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _number(view: memoryview, at: int, label: str | None, what: str) -> tuple[int, int]:
    """An unsigned LEB128 number and the offset behind it."""
    value = 0
    for group in range(9):  # 9 groups of 7 bits are 63 bits: every value fits a signed 64-bit integer
        if at + group >= len(view):
            raise err.TruncatedError(f"the file ends inside {what}", entry=label, offset=at, advice=_FETCH)
        byte = view[at + group]
        value |= (byte & 0x7F) << 7 * group
        if byte < 0x80:
            if group and not byte:
                raise err.NonMinimalNumberError(
                    f"{what} is padded: {value} in {group + 1} bytes", entry=label, offset=at, advice=_REMAKE
                )
            return value, at + group + 1
    raise err.NumberTooLargeError(f"{what} takes more than 63 bits", entry=label, offset=at, advice=_REMAKE)


def _foreign(view: memoryview) -> tuple[str, str] | None:
    """What a file that is no `.dat` is, and what to do with it. Only asked after a rule is broken, so no valid file
    is refused.
    """
    head = bytes(view[:9])
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return (
            "a zip archive (torch.save and TorchScript write these)",
            "Load it with torch and save its state dict as .dat",
        )
    if head.startswith(b"GGUF"):
        return "a GGUF file", "Import it with `align dat import`"
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= len(view) - 8:
        return "a safetensors file", "Import it with `align dat import`"
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return "a Python pickle", "Load it with torch, if you trust it, and save its state dict as .dat"
    if _is_bare_tensor(view):
        return "a single tensor without a name (Tensor.save in TorchSharp)", "Save the module's state dict instead"
    return None


def _is_bare_tensor(view: memoryview) -> bool:
    try:
        type_id, at = _number(view, 0, None, "")
        ndim, at = _number(view, at, None, "")
        if type_id not in _IDS or ndim > MAX_DIMS:
            return False
        dims = []
        for _ in range(ndim):
            dim, at = _number(view, at, None, "")
            dims.append(dim)
        # A 0-d tensor of a few bytes is too easily something else.
        return ndim > 0 and 0 < count_bytes(ScalarType(type_id), tuple(dims), "", None) == len(view) - at
    except DatError:
        return False


_IDS = frozenset(int(scalar_type) for scalar_type in ScalarType)
_REMAKE = "Make the file again with its exporter"
_FETCH = "The file is cut short or damaged: fetch it again"
