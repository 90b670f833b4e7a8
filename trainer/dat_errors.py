"""What can be wrong with a `.dat` file: one error per rule.

Every message says what was found, in which entry, at which byte of the file, and what to do about it. `DatError`
catches all.
"""

from pathlib import Path


class DatError(ValueError):
    """A `.dat` file, or something about to be written to one, breaks a rule of the format."""

    entry: str | None
    """The entry's name, or `#7` (its position) while the name is not known; `None` for the file as a whole."""
    offset: int | None
    """The byte of the file where the broken value starts; `None` when nothing was read."""
    path: Path | None = None
    """The file, where it is known; not part of the message."""

    def __init__(self, found: str, *, entry: str | None = None, offset: int | None = None, advice: str = "") -> None:
        where = [f"entry {entry!r}" if entry else "", f"byte {offset}" if offset is not None else ""]
        place = ", ".join(part for part in where if part)
        super().__init__(f"{place}: {found}" * bool(place) or found, advice)
        self.entry, self.offset = entry, offset

    def __str__(self) -> str:
        found, advice = self.args
        return f"{found}. {advice}" if advice else str(found)


class NotAFileError(DatError):
    """The path is a folder, a pipe or a device."""


class ForeignFileError(DatError):
    """The bytes are those of another format (zip, safetensors, GGUF, pickle, a bare tensor) under the name `.dat`."""


class TruncatedError(DatError):
    """The file ends inside a header."""


class DataTruncatedError(TruncatedError):
    """An entry claims more bytes of data than the file has left."""


class NonMinimalNumberError(DatError):
    """A LEB128 number is padded with empty groups: two spellings of a number are one too many."""


class NumberTooLargeError(DatError):
    """A LEB128 number takes more than 63 bits."""


class TooManyEntriesError(DatError):
    """The entry count is beyond what any model needs, so reading on would only cost memory."""


class EmptyNameError(DatError):
    """An entry has no name."""


class NameTooLongError(DatError):
    """A name has more bytes than `MAX_NAME_BYTES`."""


class NameNotUtf8Error(DatError):
    """A name is not UTF-8."""


class DuplicateNameError(DatError):
    """Two entries have one name."""


class UnknownScalarTypeError(DatError):
    """A scalar type id that the format does not have."""


class TooManyDimensionsError(DatError):
    """More dimensions than `MAX_DIMS`."""


class ShapeOverflowError(DatError):
    """The product of a shape, in bytes, does not fit 63 bits."""


class TrailingBytesError(DatError):
    """Bytes follow the last entry."""


class InvalidBoolError(DatError):
    """A bool entry holds a byte other than 0 and 1."""


class NonFiniteValueError(DatError):
    """A stored value, or a scale, is NaN or infinite."""


class NegativeScaleError(DatError):
    """A scale is negative: no exporter writes one, so the byte was damaged."""


class PairError(DatError):
    """An NVFP4 entry has no partner, or the two do not fit each other."""


class EntryCountError(DatError):
    """More or fewer entries were written than announced."""


class EntryDataError(DatError):
    """The data handed to the writer does not fit the scalar type or shape handed with it."""
