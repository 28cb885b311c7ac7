"""Adapters of the host's backbones. Importing this package makes all of them known."""

from fairchem_scd.denoising.adapter import Adapter, adapter_for, known_backbones, register_adapter
from fairchem_scd.fairchem2.backbones.escn_md import ESCNMDAdapter, ESCNMDMoeAdapter

__all__ = ["Adapter", "ESCNMDAdapter", "ESCNMDMoeAdapter", "adapter_for", "known_backbones", "register_adapter"]
