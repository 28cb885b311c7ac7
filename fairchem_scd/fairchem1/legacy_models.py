"""Table of the host's legacy models, which are backbone and heads in one class, and of the hydras that equal them.

A hydra is the host's HydraModel: a backbone, and heads by name. Given the weights of the legacy model, it computes the
same outputs. The table is open: an entry for a model of your own can be added to `LEGACY_MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Heads = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class LegacyModel:
    """The hydra that equals a legacy model.

    Attributes:
        backbone: the name of its backbone.
        heads: makes its heads, as a `model.heads` block, from the arguments of the legacy model.
        moved: submodules of the legacy model that lie in a head of the hydra, each with the name of the head. All other
            submodules lie in the backbone.
        dropped: arguments of the legacy model that the hydra does not have, each with the only value for which the
            hydra equals it.
        without_effect: arguments that the hydra's backbone takes but does not use.
    """

    backbone: str
    heads: Callable[[Mapping[str, Any]], Heads]
    moved: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, Any] = field(default_factory=dict)
    without_effect: tuple[str, ...] = ()


def _modules(**modules: str) -> Callable[[Mapping[str, Any]], Heads]:
    """Heads whose only argument is their module, whatever the arguments of the legacy model."""
    return lambda arguments: {name: {"module": module} for name, module in modules.items()}


def _gemnet_t_heads(arguments: Mapping[str, Any]) -> Heads:
    heads = {"energy": {"module": "gemnet_t_energy_and_grad_force_head"}}
    if arguments.get("direct_forces", False):
        heads["forces"] = {"module": "gemnet_t_force_head"}
    return heads


def _gemnet_oc_heads(arguments: Mapping[str, Any]) -> Heads:
    heads: Heads = {"energy": {"module": "gemnet_oc_energy_and_grad_force_head"}}
    if arguments.get("direct_forces", False):
        heads["forces"] = {"module": "gemnet_oc_force_head"}
    for head in heads.values():
        head["num_global_out_layers"] = arguments.get("num_global_out_layers", 2)
        if "output_init" in arguments:
            head["output_init"] = arguments["output_init"]
    return heads


_EQUIFORMER_V2 = LegacyModel(
    "equiformer_v2_backbone",
    heads=_modules(energy="equiformerV2_scalar_head", forces="equiformerV2_vector_head"),
    moved={"energy_block": "energy", "force_block": "forces"},
    # The first is an option of EquiformerV2's own repository, which the host's class never had.
    dropped={"use_tp_reparam": False, "use_energy_lin_ref": False},
)
_ESCN = LegacyModel(
    "escn_backbone",
    heads=_modules(energy="escn_energy_head", forces="escn_force_head"),
    moved={"energy_block": "energy", "force_block": "forces"},
    without_effect=("activation_checkpoint",),
)

LEGACY_MODELS: dict[str, LegacyModel] = {
    "equiformer_v2": _EQUIFORMER_V2,
    "equiformer_v2_dens": _EQUIFORMER_V2,
    "escn": _ESCN,
    "escn_dens": _ESCN,
    "painn": LegacyModel(
        "painn_backbone",
        heads=_modules(energy="painn_energy_head", forces="painn_force_head"),
        moved={"out_energy": "energy", "out_forces": "forces"},
    ),
    "gemnet_t": LegacyModel("gemnet_t_backbone", heads=_gemnet_t_heads),
    "gemnet_oc": LegacyModel(
        "gemnet_oc_backbone",
        heads=_gemnet_oc_heads,
        moved={"out_mlp_E": "energy", "out_energy": "energy", "out_mlp_F": "forces", "out_forces": "forces"},
    ),
    "dimenetplusplus": LegacyModel(
        "dimenetplusplus_backbone", heads=_modules(energy="dimenetplusplus_energy_and_force_head")
    ),
}
"""By the name that a config calls the legacy model."""

WITHOUT_HYDRA = frozenset({"schnet", "scn", "gp_gemnet_t", "escn_export"})
"""Legacy models whose backbone the host has no hydra backbone of."""
