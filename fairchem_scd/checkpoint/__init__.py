"""Checkpoints between kinds of model: plain host checkpoints to denoising ones, and back."""

from fairchem_scd.checkpoint.adapt import adapt, carry_over, is_of
from fairchem_scd.checkpoint.files import read, what_next
from fairchem_scd.checkpoint.plain import to_plain
from fairchem_scd.checkpoint.source import ADDED, source_weights

__all__ = ["ADDED", "adapt", "carry_over", "is_of", "read", "source_weights", "to_plain", "what_next"]
