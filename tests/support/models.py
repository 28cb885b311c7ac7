"""The smallest models of fairchem 1.x that are still theirs, and edge frames that are not random."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from fairchem.core.common.utils import setup_imports
from fairchem.core.models.base import HydraModel
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from fairchem.core.models.escn.escn import eSCN
from fairchem.core.models.esen import esen, esen_dens

import tests.support.once  # noqa: F401  (makes models quick to build)
from fairchem_scd.fairchem1.hydra import DenoisingHydra

setup_imports()  # the host's whole registry, as at the start of any mode

EQUIFORMER_V2 = {
    "model": "equiformer_v2_backbone",
    "use_pbc": True,
    "otf_graph": True,
    "max_neighbors": 300,  # a number that cuts breaks ties between equal distances by batch composition
    "max_radius": 4.5,
    "max_num_elements": 90,
    "num_layers": 2,
    "sphere_channels": 8,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 8,
    "norm_type": "layer_norm_sh",
    "lmax_list": [2],
    "mmax_list": [2],
    "edge_channels": 8,
    "attn_activation": "silu",
    "ffn_activation": "silu",
    "use_grid_mlp": True,
    "alpha_drop": 0.0,
    "drop_path_rate": 0.0,
    "weight_init": "uniform",
}
ESCN = {
    "model": "escn_backbone",
    "use_pbc": True,
    "otf_graph": True,
    "max_neighbors": 300,
    "cutoff": 4.5,
    "max_num_elements": 90,
    "num_layers": 2,
    "lmax_list": [2],
    "mmax_list": [2],
    "sphere_channels": 8,
    "hidden_channels": 8,
    "edge_channels": 8,
    "num_sphere_samples": 32,
    "distance_resolution": 0.1,
}
ESEN = {
    "model": "esen_backbone",
    "use_pbc": True,
    "otf_graph": True,
    "max_neighbors": 300,
    "cutoff": 4.5,
    "max_num_elements": 90,
    "num_layers": 2,
    "lmax": 2,
    "mmax": 2,
    "sphere_channels": 8,
    "hidden_channels": 8,
    "edge_channels": 8,
    "num_distance_basis": 16,
    "grid_resolution": 14,
}
# As its paper has it, for forces that are a gradient.
ESEN_SMOOTH = {**ESEN, "direct_forces": False, "act_type": "gate", "mlp_type": "spectral", "use_envelope": True}
BACKBONES = {"equiformer_v2": EQUIFORMER_V2, "escn": ESCN}
HEADS = {
    "equiformer_v2": {
        "energy": {"module": "equiformerV2_scalar_head"},
        "forces": {"module": "equiformerV2_vector_head"},
    },
    "escn": {"energy": {"module": "escn_energy_head"}, "forces": {"module": "escn_force_head"}},
}
ESEN_HEADS = {"energy": {"module": "esen_mlp_energy_head"}, "forces": {"module": "esen_linear_force_head"}}
ESEN_GRADIENT_HEAD = {"both": {"module": "esen_mlp_efs_head"}}


def hydra_arguments(name: str, **backbone: Any) -> dict[str, Any]:
    """Arguments of a tiny HydraModel on a backbone of `BACKBONES`."""
    return {
        "backbone": {**copy.deepcopy(BACKBONES[name]), **backbone},
        "heads": copy.deepcopy(HEADS[name]),
        "pass_through_head_outputs": True,
    }


def plain_and_denoising(name: str, block: dict[str, Any], **backbone: Any) -> tuple[HydraModel, DenoisingHydra]:
    """The host's plain model and this package's, with equal host weights."""
    torch.manual_seed(0)
    plain = HydraModel(**hydra_arguments(name, **backbone))
    torch.manual_seed(0)
    denoising = DenoisingHydra(denoising=block, **hydra_arguments(name, **backbone))
    state = denoising.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value), f"{key}: construction changed the host's initial weights"
    return plain, denoising


def fixed_edge_frames(backbone: Any, data: Any, edge_index: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Stands in for a backbone's `_init_edge_rot_mat`, whose frames are random about the edge."""
    return _frames(vectors).detach()


def _frames(vectors: torch.Tensor, rot_clip: bool = True) -> torch.Tensor:
    """As eSEN's `init_edge_rot_mat`, which has derivatives where forces are some, but for edges along y."""
    y = vectors / vectors.norm(dim=1, keepdim=True)
    y = torch.where(y[:, 1:2].abs() > 0.999999, y.detach(), y)
    axis = torch.nn.functional.one_hot(y.abs().argmin(dim=1), 3).to(y)
    z = torch.linalg.cross(y, axis)
    z = z / z.norm(dim=1, keepdim=True)
    frames = torch.stack([torch.linalg.cross(y, z), y, z], dim=1)
    return frames if rot_clip else frames.detach()


@contextmanager
def edge_frames_without_chance() -> Iterator[None]:
    """While entered, every backbone has `fixed_edge_frames`."""
    with ExitStack() as stack:
        for model in (EquiformerV2Backbone, EquiformerV2, eSCN):
            stack.enter_context(mock.patch.object(model, "_init_edge_rot_mat", fixed_edge_frames))
        for module in (esen, esen_dens):
            stack.enter_context(mock.patch.object(module, "init_edge_rot_mat", _frames))
        yield
