"""Denoising checkpoints made plain: what fairchem loads and trains on without this package."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from fairchem.core.models.base import HydraModel

from fairchem_scd.checkpoint.source import (
    ADDED,
    Source,
    bare,
    has_mask_token,
    is_pretrained,
    source_weights,
    trainable,
    whole,
)
from fairchem_scd.config import ConfigError


def to_plain(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of the plain host hydra, which fairchem loads and trains on without this package.

    Host weights keep their keys and values; optimiser state and moving average are kept for them.
    """
    if is_pretrained(checkpoint):
        raise ConfigError(
            "a checkpoint of pre-training has no heads and predicts nothing; name it under "
            "model.finetune_config.starting_checkpoint and fine-tune"
        )
    if has_mask_token(checkpoint["state_dict"]):
        raise ConfigError(
            "trained with task.denoising.scd.null_condition: mask_token, which stands for the condition in every pass: "
            "the plain model computes something else"
        )
    plain = dict(checkpoint)
    plain["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not bare(k).startswith(ADDED)}
    config = copy.deepcopy(dict(checkpoint["config"]))
    if config["model"].get("legacy_weight_decay"):
        logging.info("the plain hydra chooses by another rule which parameters to decay than this run did")
    block = whole(config["model"])
    for key in ("name", "denoising", "legacy_weight_decay"):
        block.pop(key, None)
    config["task"].pop("denoising", None)
    plain["config"] = {**config, "model": {**block, "name": "hydra"}}
    model = HydraModel(**block)
    source = Source(checkpoint, model)
    if plain.get("ema") is not None:
        plain["ema"] = source.ema(trainable(model), source_weights(checkpoint), plain["ema"]["decay"])
    if plain.get("optimizer") is not None:
        groups = source.groups(model.no_weight_decay())
        empty = {"state": {}, "param_groups": [dict(g) for g in plain["optimizer"]["param_groups"]]}
        start = 0
        for group, names in zip(empty["param_groups"], groups, strict=True):
            group["params"] = list(range(start, start + len(names)))
            start += len(names)
        plain["optimizer"] = source.optimizer(empty, groups, keep_rate=True)
    return plain
