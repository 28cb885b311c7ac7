"""The parts of a `DenoisingHydra` that its other forms change."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fairchem_scd.denoising.conditions import ConditionHead


def head_of(model: Any) -> ConditionHead:
    """What makes the embedding and the condition."""
    return model.denoising["scd"]["condition_head"]


def blocks_of(model: Any) -> nn.ModuleList:
    """The modulation of each block."""
    return model.denoising["scd"]["modulation"].blocks


def seen_of(scalars: Tensor) -> Tensor:
    """What a modulation sees of the l = 0 features."""
    return functional.layer_norm(scalars.detach().float(), scalars.shape[-1:])


def numbers_of(model: Any) -> Numbers:
    """The atomic numbers of the passes of a model, from now on."""
    numbers = Numbers()
    model.backbone.register_forward_pre_hook(numbers.note)
    return numbers


class Numbers:
    """The atomic numbers [n] of the pass that is running."""

    def note(self, _: nn.Module, inputs: tuple[Any]) -> None:
        self.of_pass = inputs[0].atomic_numbers.long()
