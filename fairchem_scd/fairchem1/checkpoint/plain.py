"""Checkpoints made plain and whole: what fairchem loads and trains on without this package, or any other file."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from typing import Any

from fairchem.core.models.base import HydraModel
from torch import Tensor

from fairchem_scd.denoising.conditions.self_condition import check_exportable
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.checkpoint.stored_run import WEIGHTS_KEY, StoredRun, Weights, build_hydra
from fairchem_scd.fairchem1.checkpoint.training_state import KEYS
from fairchem_scd.fairchem1.legacy import HYDRA

_OURS = (HYDRA, "denoising_hydra")


def export(
    checkpoint: Mapping[str, Any], *, weights: Weights | None = None, backbone_only: bool = False
) -> dict[str, Any]:
    """A checkpoint to predict with in plain fairchem: the host's model, keys and config, and no training state.

    Args:
        checkpoint: of this package, or of the plain hydra fine-tuned from another checkpoint.
        weights: "ema", the moving average, or "raw"; None: the average where the checkpoint has one.
        backbone_only: leave the heads out; what is left is what `model.finetune_config.starting_checkpoint` needs.

    Returns:
        A new checkpoint with the weights that were asked for, normalisers and element references.

    Raises:
        ConfigError: the checkpoint does not hold these weights, the plain model cannot compute what this one does, or
            it has no heads and `backbone_only` is False.
    """
    run = StoredRun(checkpoint)
    _check_exportable(run)
    if run.is_pretrained and not backbone_only:
        raise ConfigError(
            "a checkpoint of pre-training has no heads and predicts nothing; --backbone-only writes what "
            "model.finetune_config.starting_checkpoint needs to fine-tune from it"
        )
    config = _plain_config(run)
    if backbone_only:
        config["model"]["heads"] = {}
        config.update(outputs={}, loss_functions=[], evaluation_metrics={})
    model = run.build()
    chosen = run.inference_weights(weights, model)
    plain = build_hydra(HydraModel, config["model"])
    state = {**_unused(plain, model.state_dict()), **chosen}
    state = {key: state[key] for key in plain.state_dict()}
    plain.load_state_dict(state)  # strictly, as the host will
    exported = {key: value for key, value in checkpoint.items() if key not in KEYS}
    held = weights or ("ema" if "ema" in run.kinds_of_weights else "raw")
    return {**exported, "state_dict": state, "config": config, "amp": None, WEIGHTS_KEY: held}


def to_plain(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of the plain host hydra, which fairchem loads and trains on without this package.

    Host weights keep their keys and values; optimiser state and moving average are kept for them.

    Raises:
        ConfigError: the plain model cannot compute what this one does, or it has no heads.
    """
    run = StoredRun(checkpoint)
    _check_exportable(run)
    if run.is_pretrained:
        raise ConfigError(
            "a checkpoint of pre-training has no heads and predicts nothing; name it under "
            "model.finetune_config.starting_checkpoint and fine-tune"
        )
    trained = run.build()
    run.check_weights(trained)
    config = _plain_config(run)
    if run.decays_as_legacy:
        logging.warning("the plain hydra chooses by another rule which parameters to decay than this run did")
    model = build_hydra(HydraModel, config["model"])
    weights = {**_unused(model, trained.state_dict()), **run.weights}
    plain = {**checkpoint, "config": config, "state_dict": {key: weights[key] for key in model.state_dict()}}
    if plain.get("ema") is not None:
        plain["ema"] = run.training_state(model).average_for(model, weights, plain["ema"]["decay"])
    if plain.get("optimizer") is not None:
        plain["optimizer"] = _plain_optimizer(run, model)
    return plain


def _plain_optimizer(run: StoredRun, model: HydraModel) -> dict[str, Any]:
    """State of the optimiser that the plain host makes for `model`, with what the run knows of its parameters."""
    state = run.training_state(model)
    # The plain model may have more than the run (see `_unused`). In a single group the host has frozen ones too.
    single = len(run.checkpoint["optimizer"]["param_groups"]) == 1
    names = [name for name, parameter in model.named_parameters() if single or parameter.requires_grad]
    groups = state.groups(model.no_weight_decay(), names)
    fresh = {"state": {}, "param_groups": [dict(group) for group in run.checkpoint["optimizer"]["param_groups"]]}
    start = 0
    for group, names in zip(fresh["param_groups"], groups, strict=True):
        group["params"] = list(range(start, start + len(names)))
        start += len(names)
    return state.optimizer_for(fresh, groups, keep_rate=True)


def _unused(plain: HydraModel, trained: Collection[str]) -> dict[str, Tensor]:
    """Weights that the plain model has and the trained one has not, with values of no meaning.

    They belong to output layers that are parts of the host's backbone where no head takes them out: eSCN's without an
    energy head, PaiNN's without both heads. Nothing reads them.
    """
    return {key: value for key, value in plain.state_dict().items() if key not in trained}


def _check_exportable(run: StoredRun) -> None:
    name = run.model_block.get("name")
    # A plain hydra is one as it is, unless another checkpoint, maybe of this package, says what its backbone is.
    if name not in _OURS and not (name == "hydra" and run.model_block.get("finetune_config")):
        raise ConfigError(f"the checkpoint's model is '{name}', not this package's: fairchem loads it as it is")
    check_exportable(run.weights)


def _plain_config(run: StoredRun) -> dict[str, Any]:
    """The config with the host's own model, whole: no starting checkpoint is needed to build it."""
    block = run.whole_model_block
    if run.backbone_overrides:
        raise ConfigError(
            f"model.finetune_config.override: {', '.join(run.backbone_overrides)}: fairchem sets these on the finished "
            "backbone, which does something else than arguments of these names; a plain config cannot say so. Where "
            "this package is installed the checkpoint works as it is"
        )
    for key in ("denoising", "legacy_weight_decay", "self_supervised"):
        block.pop(key, None)
    # Scale factors are among the weights. Named, their file would have to be there wherever the host builds the model.
    block["backbone"].pop("scale_file", None)
    config = copy.deepcopy(run.config)
    task = {key: value for key, value in (config.get("task") or {}).items() if key != "denoising"}
    return {**config, "task": task, "model": {**block, "name": "hydra"}}
