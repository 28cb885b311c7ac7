"""Checkpoints between kinds of model: plain host checkpoints to denoising ones, and back.

`StoredRun` reads what is known of a run from its checkpoint; every function here asks it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fairchem_scd.fairchem1.checkpoint.adapt import adapt, carry_over, is_of, regrouped
from fairchem_scd.fairchem1.checkpoint.dens_import import from_dens
from fairchem_scd.fairchem1.checkpoint.files import how_to_use, read, what_next
from fairchem_scd.fairchem1.checkpoint.plain import export, to_plain
from fairchem_scd.fairchem1.checkpoint.stored_run import StoredRun, Weights
from fairchem_scd.fairchem1.checkpoint.training_state import ADDED
from fairchem_scd.fairchem1.hydra import DenoisingHydra

__all__ = [
    "ADDED",
    "StoredRun",
    "adapt",
    "build",
    "carry_over",
    "export",
    "from_dens",
    "how_to_use",
    "inference_weights",
    "is_of",
    "read",
    "regrouped",
    "source_weights",
    "to_plain",
    "what_next",
]


def build(checkpoint: Mapping[str, Any]) -> DenoisingHydra:
    """The model that a checkpoint is of, with fresh weights. See `StoredRun.build`."""
    return StoredRun(checkpoint).build()


def source_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint by the names that DenoisingHydra has for them, in the checkpoint's order."""
    return StoredRun(checkpoint).weights


def inference_weights(
    checkpoint: Mapping[str, Any], weights: Weights | None = None, *, model: DenoisingHydra | None = None
) -> dict[str, Tensor]:
    """The weights of a checkpoint to predict with. See `StoredRun.inference_weights`.

    Args:
        checkpoint: of any kind that `build` knows.
        weights: "ema", the moving average, or "raw"; None: the average where the checkpoint has one.
        model: what `build` makes of the checkpoint, if it is at hand.
    """
    run = StoredRun(checkpoint)
    return run.inference_weights(weights, model if model is not None else run.build())
