"""Turns the model block of a config into one for DenoisingHydra: legacy models and the host's own DeNS models too."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2.equiformer_v2_dens import (
    DeNSRank2Head,
    DeNSScalarHead,
    DeNSVectorHead,
    EqV2DeNSBackbone,
)
from fairchem.core.models.esen import esen_dens

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import adapter_class, known_backbones
from fairchem_scd.fairchem1.legacy_models import LEGACY_MODELS, WITHOUT_HYDRA

HYDRA = "fairchem_scd.DenoisingHydra"
"""The name under which checkpoints store the model. It is dotted, so that the host can import the model by it."""

# The host's DeNS modules, and the names of the plain modules that they extend.
_PLAIN = {
    EqV2DeNSBackbone: "equiformer_v2_backbone",
    DeNSScalarHead: "equiformerV2_scalar_head",
    DeNSVectorHead: "equiformerV2_vector_head",
    DeNSRank2Head: "rank2_symmetric_head",
    esen_dens.eSEN_DeNS_Backbone: "esen_backbone",
    esen_dens.MLP_EFS_Head: "esen_mlp_efs_head",
    esen_dens.Linear_Force_Head_DeNS: "esen_linear_force_head",
}
# Arguments of the host's DeNS models, and the settings of the dens task that say the same.
_TASK_SETTINGS = {"use_force_encoding": "force_encoding", "use_noise_schedule_sigma_encoding": "sigma_encoding"}


def to_hydra(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn a model block of the host into one for DenoisingHydra.

    Args:
        model: the `model` block: a hydra, or a legacy model of `LEGACY_MODELS`.

    Returns:
        The block of the hydra, under this package's model name; and the settings of the `dens` task that follow from
        the host's DeNS modules in it.

    Raises:
        ConfigError: there is no hydra that equals the model, or its backbone cannot be trained with denoising.
    """
    model = copy.deepcopy(dict(model))
    name = model.get("name")
    if name not in ("hydra", "denoising_hydra", HYDRA):
        model = _legacy_to_hydra(name, model)
    dens = _plain_modules(model)
    if model.get("backbone") is not None:
        _check_backbone(model)
    model["name"] = HYDRA
    return model, dens


def hydra_key(key: str) -> str:
    """The name that a weight of a legacy model has in the hydra that equals it."""
    moved = {module: head for legacy in LEGACY_MODELS.values() for module, head in legacy.moved.items()}
    head = moved.get(key.partition(".")[0])
    return f"backbone.{key}" if head is None else f"output_heads.{head}.{key}"


def _legacy_to_hydra(name: str | None, model: dict[str, Any]) -> dict[str, Any]:
    if name not in LEGACY_MODELS:
        why = ": fairchem has no hydra backbone of it" if name in WITHOUT_HYDRA else ""
        raise ConfigError(
            f"model.name: '{name}' cannot be trained with denoising{why}; use 'hydra' with one of the backbones "
            f"{', '.join(known_backbones())}, or one of the legacy models {', '.join(sorted(LEGACY_MODELS))}"
        )
    legacy = LEGACY_MODELS[name]
    backbone = {key: value for key, value in model.items() if key != "name"}
    heads = legacy.heads(backbone)
    for key, value in legacy.dropped.items():
        if backbone.pop(key, value) != value:
            raise ConfigError(
                f"model.{key}: '{name}' is trained as a hydra, which does not have this option; set it to {value!r}"
            )
    for key in legacy.without_effect:
        if backbone.get(key):
            logging.warning("model.%s has no effect: the host's %s ignores it", key, legacy.backbone)
    logging.info("model '%s' is trained as the hydra that equals it, with the backbone %s", name, legacy.backbone)
    return {
        "backbone": {"model": legacy.backbone, **backbone},
        "heads": heads,
        # The collater reads this one at the top of the block.
        "otf_graph": True,
        "pass_through_head_outputs": True,
        "legacy_weight_decay": True,
    }


def _plain_modules(model: dict[str, Any]) -> dict[str, Any]:
    """Replace the host's DeNS modules by plain ones, in place, and return the settings of `dens` that follow."""
    dens = {}
    backbone = model.get("backbone") or {}
    if "model" in backbone:
        backbone["model"] = _plain_name(backbone["model"])
    for key, setting in _TASK_SETTINGS.items():
        if key in backbone:
            dens[setting] = backbone.pop(key)
    trained = {}
    for name, head in (model.get("heads") or {}).items():
        if "module" in head:
            head["module"] = _plain_name(head["module"])
        if "use_denoising" in head:
            trained[head.get("output_name", name)] = head.pop("use_denoising")
    if trained:
        dens["train_outputs"] = [name for name, on in {"energy": True, **trained}.items() if on]
    return dens


def _plain_name(name: str) -> str:
    """The name of the plain module, for a DeNS module of the host by its short or its dotted name."""
    try:
        return _PLAIN.get(registry.get_model_class(name), name)
    except RuntimeError:  # not a name that the host knows: a clear error follows where the module is needed
        return name


def _check_backbone(model: dict[str, Any]) -> None:
    backbone = model["backbone"]
    if "model" not in backbone or backbone["model"] is None:
        raise ConfigError("model.backbone.model: missing; it names the backbone")
    try:
        host_class = registry.get_model_class(backbone["model"])
    except RuntimeError:
        known = ", ".join(known_backbones())
        raise ConfigError(f"model.backbone.model: unknown '{backbone['model']}'; known backbones: {known}") from None
    adapter = adapter_class(host_class)
    otf_graph = model.setdefault("otf_graph", True)
    adapter.check({"otf_graph": otf_graph, **backbone})
    adapter.check_heads(backbone, model.get("heads") or {})
    backbone["otf_graph"] = True  # the default of eSCN's backbone is false
