"""Conditions: what a pass of the model is told besides the structure itself. Plain torch, usable alone."""

from fairchem_scd.conditions.force import ForceEncoding
from fairchem_scd.conditions.modulation import Given, Modulation
from fairchem_scd.conditions.self_embedding import ConditionHead

__all__ = ["ConditionHead", "ForceEncoding", "Given", "Modulation"]
