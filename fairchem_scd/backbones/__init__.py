"""Adapters: all that the package knows of a host backbone's insides. One file a backbone, all of one shape."""

from fairchem_scd.backbones.base import Adapter, adapter_for, known_backbones, register_adapter
from fairchem_scd.backbones.dimenet_plus_plus import DimeNetPlusPlusAdapter
from fairchem_scd.backbones.equiformer_v2 import EquiformerV2Adapter
from fairchem_scd.backbones.escn import ESCNAdapter
from fairchem_scd.backbones.esen import ESENAdapter
from fairchem_scd.backbones.gemnet import GemNetOCAdapter, GemNetTAdapter
from fairchem_scd.backbones.one_piece import HYDRA, modernise, twin_key
from fairchem_scd.backbones.painn import PaiNNAdapter

__all__ = [
    "HYDRA",
    "Adapter",
    "DimeNetPlusPlusAdapter",
    "ESCNAdapter",
    "ESENAdapter",
    "EquiformerV2Adapter",
    "GemNetOCAdapter",
    "GemNetTAdapter",
    "PaiNNAdapter",
    "adapter_for",
    "known_backbones",
    "modernise",
    "register_adapter",
    "twin_key",
]
