"""The claims about every backbone of the host that has an adapter."""

from __future__ import annotations

from fairchem_scd.testing import BackboneClaims
from tests.support import (
    BACKBONES,
    ESEN,
    ESEN_GRADIENT_HEAD,
    ESEN_HEADS,
    ESEN_SMOOTH,
    HEADS,
    edge_frames_without_chance,
)


class TestEquiformerV2(BackboneClaims):
    backbone = BACKBONES["equiformer_v2"]
    heads = HEADS["equiformer_v2"]
    without_chance = staticmethod(edge_frames_without_chance)


class TestESCN(BackboneClaims):
    backbone = {**BACKBONES["escn"], "num_sphere_samples": 128}
    heads = HEADS["escn"]
    without_chance = staticmethod(edge_frames_without_chance)


class TestESEN(BackboneClaims):
    backbone = ESEN
    heads = ESEN_HEADS
    without_chance = staticmethod(edge_frames_without_chance)


class TestConservativeESEN(BackboneClaims):
    backbone = ESEN_SMOOTH
    heads = ESEN_GRADIENT_HEAD
    without_chance = staticmethod(edge_frames_without_chance)


class TestPaiNN(BackboneClaims):
    backbone = {"model": "painn_backbone", "hidden_channels": 8, "num_layers": 2, "num_rbf": 8, "cutoff": 4.5}
    backbone |= {"max_neighbors": 300}
    heads = {"energy": {"module": "painn_energy_head"}, "forces": {"module": "painn_force_head"}}
