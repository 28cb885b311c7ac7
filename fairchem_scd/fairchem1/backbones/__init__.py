"""Adapters of the host's backbones, one file each. Importing this package makes all of them known."""

from fairchem_scd.denoising.adapter import (
    Adapter,
    adapter_class,
    adapter_for,
    adapters,
    known_backbones,
    register_adapter,
)
from fairchem_scd.fairchem1.backbones.base import Fairchem1Adapter
from fairchem_scd.fairchem1.backbones.dimenet_plus_plus import DimeNetPlusPlusAdapter
from fairchem_scd.fairchem1.backbones.equiformer_v2 import EquiformerV2Adapter
from fairchem_scd.fairchem1.backbones.escn import ESCNAdapter
from fairchem_scd.fairchem1.backbones.esen import ESENAdapter
from fairchem_scd.fairchem1.backbones.gemnet import GemNetOCAdapter, GemNetTAdapter
from fairchem_scd.fairchem1.backbones.painn import PaiNNAdapter

__all__ = [
    "Adapter",
    "DimeNetPlusPlusAdapter",
    "ESCNAdapter",
    "ESENAdapter",
    "EquiformerV2Adapter",
    "Fairchem1Adapter",
    "GemNetOCAdapter",
    "GemNetTAdapter",
    "PaiNNAdapter",
    "adapter_class",
    "adapter_for",
    "adapters",
    "known_backbones",
    "register_adapter",
]
