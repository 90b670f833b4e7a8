"""The candidate: float32 masters behind the very weights that would ship.

    candidate = Candidate(lm, seed=0)
    loss.backward()                      # through lm.module, whose parameters are the quantised view
    Optimiser(candidate, …).step(…)      # straight-through: the view's gradient is the master's (trainer.optimiser)
    candidate.refresh()
    candidate.export(Path("x.dat"))      # the same values that every forward pass and every evaluation saw

The module's parameters always hold ``decode(encode(master))`` under the exporter's rule, so training, evaluation and
the file cannot disagree.

Two things make a 4-bit base trainable without touching what it already is (docs/decisions.md, "dithered masters"):

*Kept scales.* A block keeps the scale byte the base stores as long as every weight of it fits; so an untrained block
keeps its very bytes, and a trained one does not jump to another grid.

*Dither.* Decoded weights sit exactly on the grid, where an update below half a step is lost. Each master starts at a
random point of the cell that rounds to its stored code, so the view is unchanged and an update of size d flips the
fraction d / cell of the codes: the expected change of the view is d itself, as in stochastic rounding, but with the
randomness drawn once.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer import nvfp4_jit
from trainer.dat import DatReader, ScalarType
from trainer.model import LanguageModel, ModelError
from trainer.nvfp4 import Rule, dequantise
from trainer.nvfp4_many import fake_quantise_many_, quantise_many
from trainer.rewrite import write_like

# The cell of each E2M1 magnitude, in units of the scale: everything between these bounds rounds to it. The outermost
# cell ends at 6, the largest value that keeps the block's scale.
_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CELL_LOW = (0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_CELL_HIGH = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0)


class Candidate:
    """The weights in training. ``lm`` is the model whose module becomes the quantised view; it is changed in place."""

    def __init__(self, lm: LanguageModel, *, rule: Rule = "mse", seed: int = 0, dither: float = 0.9) -> None:
        """Read masters and scales from ``lm.path``.

        ``dither`` is the share of each cell that starting points are drawn from (0: on the grid; below 1 so that no
        point lies within rounding error of a cell's edge). Raises ModelError when a trained entry cannot be written
        back.
        """
        self.lm, self.rule = lm, rule
        self.base_path = lm.path
        self.parameters: dict[str, torch.nn.Parameter] = dict(lm.module.named_parameters())
        self.masters: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self._stored: dict[str, Tensor] = {}
        """Raw entries in the file's type: what a master passes through on its way to the view."""
        generator = torch.Generator().manual_seed(seed)
        with DatReader(lm.path) as reader:
            pairs = reader.pairs()
            for name, parameter in self.parameters.items():
                if name in pairs:
                    pair = pairs[name]
                    if pair.scale.scalar_type is not ScalarType.FLOAT8_E4M3FN:
                        raise ModelError(
                            f"{lm.path}: {name} has {pair.scale.scalar_type.name} scales; only E4M3 is trained"
                        )
                    scale = reader.tensor(pair.scale.name).clone()
                    start = _dithered(reader.tensor(pair.qdata.name), scale, dither, generator)
                    self.scales[name] = scale.to(lm.device)
                elif name in reader.entries:
                    start = reader.tensor(name).float()
                    raw = reader.entries[name].scalar_type
                    self._stored[name] = torch.empty(start.shape, dtype=raw.dtype, device=lm.device)
                else:
                    raise ModelError(
                        f"{lm.path}: {name} is tied, not stored; import the base again to give it its own entry"
                    )
                self.masters[name] = start.to(lm.device).requires_grad_(True)
                parameter.requires_grad_(True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the quantised view of every master into the module."""
        for name, stored in self._stored.items():
            self.parameters[name].data.copy_(stored.copy_(self.masters[name]))
        pairs = ((name, self.masters[name], self.parameters[name].data, scale) for name, scale in self.scales.items())
        fake_quantise_many_(pairs, rule=self.rule)

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Move the view's gradients to the masters (float32); the view's are freed.

        The masters' stay allocated: memory mapped anew costs more than the copy.
        """
        for name, master in self.masters.items():
            gradient = self.parameters[name].grad
            if gradient is None or master.grad is None:
                master.grad = None if gradient is None else gradient.float()
            else:
                master.grad.copy_(gradient)
            self.parameters[name].grad = None

    def drop_gradients(self) -> None:
        """Forget the view's gradients: a step that is not taken leaves nothing behind."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def snapshot(self) -> dict[str, tuple[Tensor, ...]]:
        """What the view holds, as a file would: codes and scales of pairs, raw entries in their type. A seventh of the
        masters' size."""
        pairs = quantise_many(
            ((name, self.masters[name].detach(), scale) for name, scale in self.scales.items()), rule=self.rule
        )
        raw = {name: (self.masters[name].detach().to(stored.dtype),) for name, stored in self._stored.items()}
        return {**raw, **dict(zip(self.scales, pairs, strict=True))}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, tuple[Tensor, ...]]) -> None:
        """Take the view back to a snapshot. Masters start from the decoded values, and keep the snapshot's scales."""
        for name, master in self.masters.items():
            if name in self.scales:
                codes, scale = snapshot[name]
                self.scales[name] = scale.clone()
                master.copy_(dequantise(codes, self.scales[name], dtype=torch.float32))
            else:
                master.copy_(snapshot[name][0])
        self.refresh()

    @torch.no_grad()
    def export(self, path: Path) -> None:
        """Write the candidate as a .dat: the base's entries in their order and types, with the trained values."""
        with DatReader(self.base_path) as reader:
            write_like(reader, path, self.masters, self.scales, rule=self.rule)


def _dithered(qdata: Tensor, scale: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """float32 masters [out, in] that all round to the stored codes: drawn from the middle ``share`` of each cell.

    Sign and zero keep their meaning: +0 starts at or above zero, -0 below.
    """
    if share == 0:
        return dequantise(qdata, scale, dtype=torch.float32)
    low, high, level = (torch.tensor(v) for v in (_CELL_LOW, _CELL_HIGH, _LEVELS))
    shape = (qdata.shape[0], 2 * qdata.shape[1])
    uniform = torch.rand(shape, generator=generator)
    return nvfp4_jit.place(qdata, scale, uniform, level + (low - level) * share, level + (high - level) * share)
