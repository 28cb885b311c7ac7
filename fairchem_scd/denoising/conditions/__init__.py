"""Conditions: what a pass of the model gets besides the structure itself. Plain torch, usable alone."""

from fairchem_scd.denoising.conditions.force import ForceEncoding
from fairchem_scd.denoising.conditions.modulation import BoundModulation, Modulation
from fairchem_scd.denoising.conditions.self_condition import ConditionHead, SelfCondition

__all__ = ["BoundModulation", "ConditionHead", "ForceEncoding", "Modulation", "SelfCondition"]
