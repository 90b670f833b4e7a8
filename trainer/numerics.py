"""The two numerics of a loaded model: what enters a 4-bit layer.

    set_numerics(module, paired, "w4a4")     # from here on, until set again
    numerics_of(module)

``weights``: decoded weights, activations as they are. ``w4a4``: each linear layer whose weight the file stores as an
NVFP4 pair takes its input through ``trainer.nvfp4.quantise_activations``, as a kernel that multiplies 4 bits by 4 bits
does; the products are then taken and summed in the model's dtype, which emulates such a kernel up to the order of its
sums. The output layer is one of them when it is a pair of its own; an embedding is a look-up and takes no activations.
A file without pairs has no 4-bit layer: both numerics are the same there.

The state is the layers' class, so it travels with a deep copy of the module and cannot differ from what is computed.
Gradients go straight through.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.nvfp4 import quantise_activations

Numerics = Literal["weights", "w4a4"]

_MARK = "align_numerics"
"""The attribute of a module that says which numerics it was set to."""


class NumericsError(ValueError):
    """A name that is not a numerics, or a 4-bit weight in a layer whose input cannot be quantised here."""


class W4A4Linear(nn.Linear):
    """A linear layer that quantises its input [..., features] first."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gave it
        return F.linear(quantise_activations(input), self.weight, self.bias)


def other(numerics: Numerics) -> Numerics:
    """The one of the two that ``numerics`` is not."""
    return "w4a4" if numerics == "weights" else "weights"


def set_numerics(module: nn.Module, paired: Collection[str], numerics: Numerics) -> None:
    """Let ``module`` compute in ``numerics``; idempotent. ``paired``: the parameters that its file stores as pairs.

    Raises NumericsError, and changes nothing then.
    """
    if numerics not in get_args(Numerics):
        raise NumericsError(f"numerics {numerics!r}: choose {' or '.join(get_args(Numerics))}")
    layers: list[nn.Module] = []
    for name in paired:
        layer = module.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Embedding):
            continue
        if type(layer) not in (nn.Linear, W4A4Linear):
            raise NumericsError(f"{name} is a 4-bit weight of a {type(layer).__name__}; only of a Linear is it known")
        layers.append(layer)
    for layer in layers:
        # Not a hook: a hook's handle would stay with the original when a module is copied.
        layer.__class__ = W4A4Linear if numerics == "w4a4" else nn.Linear
    setattr(module, _MARK, numerics)


def numerics_of(module: nn.Module) -> Numerics:
    """What ``module`` was set to; ``weights`` when it never was."""
    numerics: Numerics = getattr(module, _MARK, "weights")
    return numerics


def seen_by(layer: nn.Module, states: Tensor) -> Tensor:
    """``states`` [..., features] as ``layer`` multiplies them: for those who take its weight and pass it by."""
    return quantise_activations(states) if isinstance(layer, W4A4Linear) else states
