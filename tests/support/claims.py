"""What is claimed of every backbone, for each of the host's: tests/fairchem1/test_backbones.py runs these classes.

Their names don't begin with Test, so that other tests can take models and batches from them.
"""

from __future__ import annotations

from typing import Any

import torch
from fairchem.core.models.base import HydraModel

from fairchem_scd import DenoisingHydra
from fairchem_scd.testing import BackboneClaims
from tests.support.models import (
    BACKBONES,
    ESEN,
    ESEN_GRADIENT_HEAD,
    ESEN_HEADS,
    ESEN_SMOOTH,
    HEADS,
    edge_frames_without_chance,
)

GEMNET_T = {
    "model": "gemnet_t_backbone",
    "otf_graph": True,
    "max_neighbors": 300,
    "cutoff": 4.0,
    "direct_forces": True,
    "num_spherical": 3,
    "num_radial": 4,
    "num_blocks": 2,
    "emb_size_atom": 8,
    "emb_size_edge": 10,
    "emb_size_trip": 4,
    "emb_size_rbf": 4,
    "emb_size_cbf": 4,
    "emb_size_bil_trip": 4,
    "num_before_skip": 1,
    "num_after_skip": 1,
    "num_concat": 1,
    "num_atom": 1,
}
GEMNET_OC = {
    **{key: value for key, value in GEMNET_T.items() if key not in ("emb_size_trip", "emb_size_bil_trip")},
    "model": "gemnet_oc_backbone",
    **{f"emb_size_{kind}_{way}": 4 for kind in ("trip", "quad", "aint") for way in ("in", "out")},
    "emb_size_sbf": 4,
    **{f"max_neighbors_{kind}": 300 for kind in ("qint", "aeaint", "aint")},
    "cutoff_qint": 3.0,
    "cutoff_aint": 5.0,
    "num_output_afteratom": 1,
    "num_atom_emb_layers": 1,
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
}
# The host's quadruplets have derivatives that are not finite where four atoms lie on a line, as in any crystal.
GEMNET_OC_GRADIENT = {**GEMNET_OC, "direct_forces": False, "quad_interaction": False}
DIMENET = {
    "model": "dimenetplusplus_backbone",
    "otf_graph": True,
    "cutoff": 4.0,
    "hidden_channels": 8,
    "num_blocks": 2,
    "int_emb_size": 4,
    "basis_emb_size": 4,
    "out_emb_channels": 8,
    "num_spherical": 2,
    "num_radial": 3,
}
GEMNET_T_HEADS = {
    "energy": {"module": "gemnet_t_energy_and_grad_force_head"},
    "forces": {"module": "gemnet_t_force_head"},
}
GEMNET_OC_HEADS = {
    "energy": {"module": "gemnet_oc_energy_and_grad_force_head", "num_global_out_layers": 2},
    "forces": {"module": "gemnet_oc_force_head", "num_global_out_layers": 2},
}
DIMENET_HEADS = {"energy": {"module": "dimenetplusplus_energy_and_force_head"}}


PAINN = {"model": "painn_backbone", "hidden_channels": 8, "num_layers": 2, "num_rbf": 8, "cutoff": 4.5}
PAINN |= {"max_neighbors": 300}
PAINN_HEADS = {"energy": {"module": "painn_energy_head"}, "forces": {"module": "painn_force_head"}}


class EquiformerV2(BackboneClaims):
    backbone = BACKBONES["equiformer_v2"]
    heads = HEADS["equiformer_v2"]
    without_chance = staticmethod(edge_frames_without_chance)


class ESCN(BackboneClaims):
    backbone = {**BACKBONES["escn"], "num_sphere_samples": 128}
    heads = HEADS["escn"]
    without_chance = staticmethod(edge_frames_without_chance)


class DirectESEN(BackboneClaims):
    backbone = ESEN
    heads = ESEN_HEADS
    without_chance = staticmethod(edge_frames_without_chance)


class ConservativeESEN(BackboneClaims):
    backbone = ESEN_SMOOTH
    heads = ESEN_GRADIENT_HEAD
    without_chance = staticmethod(edge_frames_without_chance)


class PaiNN(BackboneClaims):
    backbone = PAINN
    heads = PAINN_HEADS


class GemNetT(BackboneClaims):
    backbone = GEMNET_T
    heads = GEMNET_T_HEADS


class ConservativeGemNetT(BackboneClaims):
    backbone = {**GEMNET_T, "direct_forces": False}
    heads = {"energy": GEMNET_T_HEADS["energy"]}


class GemNetOC(BackboneClaims):
    backbone = GEMNET_OC
    heads = GEMNET_OC_HEADS


class ConservativeGemNetOC(BackboneClaims):
    backbone = GEMNET_OC_GRADIENT
    heads = {"energy": GEMNET_OC_HEADS["energy"]}


class DimeNetPlusPlus(BackboneClaims):
    backbone = DIMENET
    heads = DIMENET_HEADS

    def plain(self) -> HydraModel:
        return _with_an_energy(super().plain())

    def ours(self, block: dict[str, Any]) -> DenoisingHydra:
        return _with_an_energy(super().ours(block))


def _with_an_energy(model: HydraModel) -> HydraModel:
    """The host starts DimeNet++ with an energy of zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.backbone.output_blocks:
            block.lin.weight.copy_(torch.randn(block.lin.weight.shape, generator=generator))
    return model
