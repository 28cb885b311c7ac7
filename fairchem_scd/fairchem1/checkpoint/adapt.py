"""Checkpoints of one kind of run for a run of another kind: plain to denoising, other tasks, fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairchem_scd.denoising.conditions.self_condition import check_same_form
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.checkpoint.files import read
from fairchem_scd.fairchem1.checkpoint.source import (
    ADDED,
    Source,
    bare,
    check_weights,
    is_pretrained,
    model_config,
    source_weights,
    trainable,
)

_TRAINING_STATE = {"optimizer", "scheduler", "epoch", "step", "best_val_metric", "primary_metric"}


def is_of(checkpoint: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a checkpoint has exactly the weights of a model, and was trained by the same rule of weight decay."""
    legacy = bool(model_config(checkpoint).get("legacy_weight_decay"))
    if is_pretrained(checkpoint) != getattr(model, "self_supervised", False):
        return False
    theirs = {bare(key): value.shape for key, value in checkpoint["state_dict"].items()}
    ours = {key: value.shape for key, value in model.state_dict().items()}
    return theirs == ours and legacy == getattr(model, "legacy_weight_decay", False)


def adapt(
    checkpoint: Mapping[str, Any],
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None,
    ema: Any | None,
    restart: bool,
) -> dict[str, Any]:
    """Turn a checkpoint of another kind into one for `model`.

    Args:
        checkpoint: of the plain host model, its one-piece twin, or with other tasks.
        model: the unwrapped model to load it into; it lends its fresh weights for the parts it alone has.
        optimizer: of this run, in its fresh state; None: leave training state out.
        ema: the host's moving average of this run, in its fresh state, or None.
        restart: count steps from zero.

    Returns:
        A new checkpoint: host weights kept, added parts of the source dropped and of the target fresh unless both
        have them, optimiser state and moving average kept for the host's parameters.

    Raises:
        ConfigError: the host's own weights do not match.
    """
    if is_pretrained(checkpoint) != getattr(model, "self_supervised", False):
        words = ("without", "with") if is_pretrained(checkpoint) else ("with", "without")
        raise ConfigError(
            f"--checkpoint: it is of a run {words[0]} outputs, and this is one {words[1]} them; start from its "
            "backbone instead: name it under model.finetune_config.starting_checkpoint, and leave model.backbone out"
        )
    adapted = dict(checkpoint)
    weights, fresh = source_weights(checkpoint), model.state_dict()
    theirs, ours = ({k: v for k, v in values.items() if not k.startswith(ADDED)} for values in (weights, fresh))
    check_weights(theirs, ours, "the checkpoint is of another model than the config's")
    check_same_form("--checkpoint", weights, fresh)
    adapted["state_dict"] = {key: weights.get(key, value) for key, value in fresh.items()}
    added = sorted({".".join(key.split(".")[:2]) for key in fresh if key not in weights})
    logging.info("a checkpoint of another kind: its weights are kept; fresh: %s", ", ".join(added) or "nothing")

    source = Source(checkpoint, model)
    adapted["ema"] = source.ema(trainable(model), adapted["state_dict"], ema.decay) if ema is not None else None
    if optimizer is None:
        return {key: value for key, value in adapted.items() if key not in _TRAINING_STATE}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    adapted["optimizer"] = source.optimizer(optimizer.state_dict(), groups, keep_rate=not restart)
    if restart:
        adapted.update(epoch=0, step=0, scheduler=None, best_val_metric=None, primary_metric=None)
    return adapted


def carry_over(model: nn.Module, path: str | Path) -> None:
    """Load what a starting checkpoint's run added into a model that fine-tunes from it; the host carries the rest.

    A noise head goes to every task that has none of its own there. A running scale starts fresh: the noise is another.

    Raises:
        ConfigError: the backbone has been trained under a mask token that the model does not have, or the reverse.
    """
    weights = {k: v for k, v in source_weights(read(path)).items() if k.startswith(ADDED)}
    check_same_form("model.finetune_config.starting_checkpoint", weights, model.state_dict())
    heads = {key.split(".", 3)[-1]: value for key, value in weights.items() if ".noise_head." in key}
    state = {key: value for key, value in model.state_dict().items() if key.startswith(ADDED)}
    carried = []
    for key, value in state.items():
        theirs = weights.get(key, heads.get(key.split(".", 3)[-1]) if ".noise_head." in key else None)
        if ".scale." not in key and theirs is not None and theirs.shape == value.shape:
            value.copy_(theirs)
            carried.append(".".join(key.split(".")[:3]))
    if carried:
        logging.info("from the starting checkpoint besides: %s", ", ".join(sorted(set(carried))))
