"""Models in other words: legacy one-piece models and the host's own DeNS models, turned into their hydra twins."""

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
from fairchem_scd.fairchem1.backbones import Adapter, adapter_class, adapters, known_backbones

HYDRA = "fairchem_scd.DenoisingHydra"
"""The dotted name a checkpoint stores: it loads wherever this package is installed."""

# The host's DeNS modules, and the plain ones they are copies of.
_PLAIN = {
    EqV2DeNSBackbone: "equiformer_v2_backbone",
    DeNSScalarHead: "equiformerV2_scalar_head",
    DeNSVectorHead: "equiformerV2_vector_head",
    DeNSRank2Head: "rank2_symmetric_head",
    esen_dens.eSEN_DeNS_Backbone: "esen_backbone",
    esen_dens.MLP_EFS_Head: "esen_mlp_efs_head",
    esen_dens.Linear_Force_Head_DeNS: "esen_linear_force_head",
}
_WITHOUT_HYDRA_BACKBONE = {"schnet", "scn", "gp_gemnet_t", "escn_export"}
# Arguments of the DeNS models that are settings of the task here.
_TASK_SETTINGS = {"use_force_encoding": "force_encoding", "use_noise_schedule_sigma_encoding": "sigma_encoding"}


def to_hydra(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn a host model block into one for DenoisingHydra.

    Args:
        model: the `model` block: a hydra, or a legacy one-piece model that has a hydra twin.

    Returns:
        The block of the hydra twin under this package's model name, and what the block said of DeNS, in the words of
        the `dens` settings.

    Raises:
        ConfigError: a model without a twin, or one that the twin cannot reproduce.
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
    """The name a weight of a one-piece model has in its hydra twin."""
    moved = {prefix: head for cls in adapters() for prefix, head in cls.moved.items()}
    head = moved.get(key.partition(".")[0])
    return f"backbone.{key}" if head is None else f"output_heads.{head}.{key}"


def _adapter_of(name: str | None) -> type[Adapter]:
    """The adapter of a one-piece model's hydra twin. Raises ConfigError if there is none."""
    adapter = next((cls for cls in adapters() if name in cls.legacy_heads), None)
    if adapter is None:
        legacy = sorted(n for cls in adapters() for n in cls.legacy_heads)
        why = ": fairchem has no hydra backbone of it" if name in _WITHOUT_HYDRA_BACKBONE else ""
        raise ConfigError(
            f"model.name: '{name}' cannot be trained with denoising{why}; use 'hydra' with one of the backbones "
            f"{', '.join(known_backbones())}, or one of the one-piece models {', '.join(legacy)}"
        )
    return adapter


def _legacy_to_hydra(name: str | None, model: dict[str, Any]) -> dict[str, Any]:
    adapter = _adapter_of(name)
    backbone = {key: value for key, value in model.items() if key != "name"}
    heads = adapter.hydra_heads(name, backbone)
    adapter.check(backbone)
    for key, lossless in adapter.dropped.items():
        if backbone.pop(key, lossless) != lossless:
            raise ConfigError(f"model.{key}: the hydra twin of '{name}' knows only {lossless!r}")
    if backbone.get("activation_checkpoint") and adapter.names == ("escn_backbone",):
        logging.warning("model.activation_checkpoint has no effect: the host's escn_backbone ignores it")
    logging.info("model '%s' is trained as its hydra twin, backbone %s", name, adapter.names[0])
    return {
        "backbone": {"model": adapter.names[0], **backbone},
        "heads": heads,
        # The collater reads this one at the top of the block.
        "otf_graph": True,
        "pass_through_head_outputs": True,
        "legacy_weight_decay": True,
    }


def _plain_modules(model: dict[str, Any]) -> dict[str, Any]:
    """Replace the host's DeNS modules by plain ones, in place; return what they said in the words of `dens`."""
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
    """The plain twin's name, for the host's DeNS modules by whatever name, short or dotted."""
    try:
        return _PLAIN.get(registry.get_model_class(name), name)
    except RuntimeError:  # not the host's; said in better words where it matters
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
    adapter: type[Adapter] = adapter_class(host_class)
    otf_graph = model.setdefault("otf_graph", True)
    adapter.check({"otf_graph": otf_graph, **backbone})
    adapter.check_heads(backbone, model.get("heads") or {})
    # eSCN's own default is the data's graph.
    backbone["otf_graph"] = True
