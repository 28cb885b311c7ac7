"""Checkpoints between kinds of model: plain host checkpoints to denoising ones, and back."""

from fairchem_scd.fairchem1.checkpoint.adapt import adapt, carry_over, is_of
from fairchem_scd.fairchem1.checkpoint.files import read, what_next
from fairchem_scd.fairchem1.checkpoint.foreign import from_dens
from fairchem_scd.fairchem1.checkpoint.plain import export, to_plain
from fairchem_scd.fairchem1.checkpoint.source import ADDED, source_weights
from fairchem_scd.fairchem1.checkpoint.weights import build, inference_weights

__all__ = [
    "ADDED",
    "adapt",
    "build",
    "carry_over",
    "export",
    "from_dens",
    "inference_weights",
    "is_of",
    "read",
    "source_weights",
    "to_plain",
    "what_next",
]
