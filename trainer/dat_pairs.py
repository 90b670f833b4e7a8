"""Which entries of a `.dat` file are the two halves of one NVFP4 weight.

`P.weight.qdata` and `P.weight.scale`, or in the shorter key style `P.qdata` and `P.scale`, are the weight `P.weight`.
"""

from dataclasses import dataclass

from trainer import dat_errors as err
from trainer.dat_errors import DatError
from trainer.dat_format import Entry, ScalarType


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The two entries of one NVFP4 weight."""

    name: str
    """The weight's name, as a model has it: `lm_head.weight`, for both key styles."""
    qdata: Entry
    """Two 4-bit codes a byte, shape [out, in / 2]."""
    scale: Entry
    """One scale per 16 columns, shape [out, in / 16], of type FLOAT8_E4M3FN, FLOAT16 or FLOAT32."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.qdata.shape[0], self.qdata.shape[1] * 2

    @property
    def nbytes(self) -> int:
        """Bytes of data of both entries."""
        return self.qdata.nbytes + self.scale.nbytes

    @property
    def offset(self) -> int:
        """The byte of the file where the codes start."""
        return self.qdata.offset


def find_pairs(entries: dict[str, Entry]) -> tuple[dict[str, Pair], list[DatError]]:
    """The NVFP4 pairs by weight name, and one error for each entry that looks like half of a pair and is not."""
    pairs: dict[str, Pair] = {}
    problems: list[DatError] = []
    for name, entry in entries.items():
        stem, _, part = name.rpartition(".")
        if part == "scale" and stem and f"{stem}.qdata" not in entries:
            # Only next to its qdata is a scale one of ours: a model may well have a parameter called scale.
            if entry.scalar_type == ScalarType.FLOAT8_E4M3FN:
                problems.append(
                    err.PairError("a scale without its qdata", entry=name, offset=entry.offset, advice=_REMAKE)
                )
            continue
        if part != "qdata" or not stem:
            continue
        weight = stem if stem.endswith(".weight") else f"{stem}.weight"
        fault = _pair_fault(entry, entries.get(f"{stem}.scale"))
        if weight in entries or weight in pairs:
            fault = f"the weight {weight!r} is stored twice"
        if fault:
            problems.append(err.PairError(fault, entry=name, offset=entry.offset, advice=_REMAKE))
        else:
            pairs[weight] = Pair(name=weight, qdata=entry, scale=entries[f"{stem}.scale"])
    return pairs, problems


def tensors(entries: dict[str, Entry], pairs: dict[str, Pair]) -> dict[str, Pair | Entry]:
    """Every tensor by its name in a model, in file order: one of ``pairs``, or the entry that holds it."""
    owner = {pair.qdata.name: pair for pair in pairs.values()}
    scales = {pair.scale.name for pair in pairs.values()}
    held = [owner.get(name, entry) for name, entry in entries.items() if name not in scales]
    return {tensor.name: tensor for tensor in held}


def stored_as(tensor: Pair | Entry) -> str:
    """The storage of one of ``tensors``, for people."""
    if isinstance(tensor, Pair):
        return f"NVFP4, {tensor.scale.scalar_type.name} scales"
    return tensor.scalar_type.name


def _pair_fault(qdata: Entry, scale: Entry | None) -> str:
    if scale is None:
        return "qdata without its scale"
    if qdata.scalar_type not in (ScalarType.UINT8, ScalarType.FLOAT4_PACKED):
        return f"qdata of {qdata.scalar_type.name}, not UINT8 or FLOAT4_PACKED"
    if scale.scalar_type not in (ScalarType.FLOAT8_E4M3FN, ScalarType.FLOAT16, ScalarType.FLOAT32):
        return f"scales of {scale.scalar_type.name}, not FLOAT8_E4M3FN, FLOAT16 or FLOAT32"
    if len(qdata.shape) != 2 or qdata.shape[1] % 8:
        return f"qdata of shape {qdata.shape}, not [out, a multiple of 8]"
    expected = (qdata.shape[0], qdata.shape[1] // 8)
    return (
        "" if scale.shape == expected else f"scales of shape {scale.shape} where qdata {qdata.shape} needs {expected}"
    )


_REMAKE = "Make the file again with its exporter"
