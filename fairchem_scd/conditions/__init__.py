"""Conditions: what a pass of the model is told besides the structure itself. Plain torch, usable alone."""

from fairchem_scd.conditions.force import ForceEncoding

__all__ = ["ForceEncoding"]
