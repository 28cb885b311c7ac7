"""Denoising checkpoints made plain: what fairchem loads and trains on without this package."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from fairchem.core.models.base import HydraModel

from fairchem_scd.denoising.conditions.self_condition import check_exportable
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.checkpoint.source import (
    Source,
    check_weights,
    is_pretrained,
    model_config,
    source_weights,
    trainable,
    whole,
)
from fairchem_scd.fairchem1.checkpoint.weights import (
    MARK,
    OTHER_WEIGHTS,
    Weights,
    build,
    inference_weights,
    weights_held,
)
from fairchem_scd.fairchem1.legacy import HYDRA

_TRAINING_STATE = ("ema", "optimizer", "scheduler", "epoch", "step", "best_val_metric", "primary_metric")
_OURS = (HYDRA, "denoising_hydra")


def export(
    checkpoint: Mapping[str, Any], *, weights: Weights | None = None, backbone_only: bool = False
) -> dict[str, Any]:
    """A checkpoint to predict with in plain fairchem: the host's model, keys and config, and no training state.

    Args:
        checkpoint: of this package.
        weights: see `inference_weights`.
        backbone_only: leave the heads out; what is left is what `model.finetune_config.starting_checkpoint` needs.

    Returns:
        A new checkpoint with the weights that were asked for, normalisers and element references.

    Raises:
        ConfigError: the plain model cannot compute what this one does, or it has no heads and `backbone_only` is False.
    """
    _check_exportable(checkpoint)
    if is_pretrained(checkpoint) and not backbone_only:
        raise ConfigError(
            "a checkpoint of pre-training has no heads and predicts nothing; --backbone-only writes what "
            "model.finetune_config.starting_checkpoint needs to fine-tune from it"
        )
    config = _plain_config(checkpoint)
    if backbone_only:
        config["model"]["heads"] = {}
        config.update(outputs={}, loss_functions=[], evaluation_metrics={})
    model = build(checkpoint)
    chosen = inference_weights(checkpoint, weights, model=model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = _hydra(config["model"])
    # eSCN's class has a block that its energy head takes out: without heads any values will do.
    idle = {key: value for key, value in plain.state_dict().items() if key not in model.state_dict()}
    state = {key: chosen.get(key, idle.get(key)) for key in plain.state_dict()}
    plain.load_state_dict(state)  # as the host will; strict
    exported = {key: value for key, value in checkpoint.items() if key not in _TRAINING_STATE}
    held = weights or ("ema" if "ema" in weights_held(checkpoint) else "raw")
    return {**exported, "state_dict": state, "config": config, "amp": None, MARK: held}


def to_plain(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of the plain host hydra, which fairchem loads and trains on without this package.

    Host weights keep their keys and values; optimiser state and moving average are kept for them.

    Raises:
        ConfigError: as `export`.
    """
    _check_exportable(checkpoint)
    if is_pretrained(checkpoint):
        raise ConfigError(
            "a checkpoint of pre-training has no heads and predicts nothing; name it under "
            "model.finetune_config.starting_checkpoint and fine-tune"
        )
    check_weights(source_weights(checkpoint), build(checkpoint).state_dict(), OTHER_WEIGHTS)
    config = _plain_config(checkpoint)
    if checkpoint["config"]["model"].get("legacy_weight_decay"):
        logging.warning("the plain hydra chooses by another rule which parameters to decay than this run did")
    model = _hydra(config["model"])
    weights, source = source_weights(checkpoint), Source(checkpoint, model)
    plain = {**checkpoint, "config": config, "state_dict": {key: weights[key] for key in model.state_dict()}}
    if plain.get("ema") is not None:
        plain["ema"] = source.ema(trainable(model), weights, plain["ema"]["decay"])
    if plain.get("optimizer") is not None:
        groups = source.groups(model.no_weight_decay())
        empty = {"state": {}, "param_groups": [dict(g) for g in plain["optimizer"]["param_groups"]]}
        start = 0
        for group, names in zip(empty["param_groups"], groups, strict=True):
            group["params"] = list(range(start, start + len(names)))
            start += len(names)
        plain["optimizer"] = source.optimizer(empty, groups, keep_rate=True)
    return plain


def _check_exportable(checkpoint: Mapping[str, Any]) -> None:
    name = model_config(checkpoint).get("name")
    if name not in _OURS:
        raise ConfigError(f"the checkpoint's model is '{name}', not this package's: fairchem loads it as it is")
    check_exportable(checkpoint["state_dict"])


def _plain_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the host's own model, whole: no starting checkpoint is needed to build it."""
    config = copy.deepcopy(dict(checkpoint["config"]))
    block, overrides = whole(config["model"])
    if overrides:
        raise ConfigError(
            f"model.finetune_config.override: {', '.join(overrides)}: fairchem sets these on the finished backbone, "
            "which does something else than arguments of these names; a plain config cannot say so. Where this package "
            "is installed the checkpoint works as it is"
        )
    for key in ("denoising", "legacy_weight_decay", "self_supervised"):
        block.pop(key, None)
    # Scale factors are among the weights; the host would want the file they came from wherever it builds the model.
    block["backbone"].pop("scale_file", None)
    task = {key: value for key, value in (config.get("task") or {}).items() if key != "denoising"}
    return {**config, "task": task, "model": {**block, "name": "hydra"}}


def _hydra(block: Mapping[str, Any]) -> HydraModel:
    return HydraModel(**{key: value for key, value in copy.deepcopy(dict(block)).items() if key != "name"})
