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
from fairchem_scd.fairchem1.checkpoint.stored_run import StoredRun, check_weights
from fairchem_scd.fairchem1.checkpoint.training_state import ADDED, KEYS


def is_of(checkpoint: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a checkpoint has exactly the weights of a model, and was trained by the same rule of weight decay."""
    run = StoredRun(checkpoint)
    if run.is_legacy or run.is_pretrained != getattr(model, "self_supervised", False):
        return False
    stored = {key: value.shape for key, value in run.weights.items()}
    own = {key: value.shape for key, value in model.state_dict().items()}
    return stored == own and run.decays_as_legacy == getattr(model, "legacy_weight_decay", False)


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
        checkpoint: of the plain host model, of a legacy model, or with other tasks.
        model: the unwrapped model to load it into; it lends its fresh weights for the parts it alone has.
        optimizer: of this run, in its fresh state; None: leave training state out.
        ema: the host's moving average of this run, in its fresh state, or None.
        restart: count steps from zero.

    Returns:
        A new checkpoint. It keeps the host's weights, with their optimiser state and moving average. Of what was added,
        it has what `model` has: from the checkpoint where that has it too, else fresh.

    Raises:
        ConfigError: the host's own weights do not match.
    """
    run, fresh = StoredRun(checkpoint), model.state_dict()
    if run.is_pretrained != getattr(model, "self_supervised", False):
        words = ("without", "with") if run.is_pretrained else ("with", "without")
        raise ConfigError(
            f"--checkpoint: it is of a run {words[0]} outputs, and this is one {words[1]} them; start from its "
            "backbone instead: name it under model.finetune_config.starting_checkpoint, and leave model.backbone out"
        )
    stored, own = ({k: v for k, v in values.items() if not k.startswith(ADDED)} for values in (run.weights, fresh))
    stored = {key: value for key, value in stored.items() if not _taken_out(key, model)}
    check_weights(stored, own, "the checkpoint is of another model than the config's")
    check_same_form("--checkpoint", run.weights, fresh)
    adapted = {**checkpoint, "state_dict": {key: run.weights.get(key, value) for key, value in fresh.items()}}
    added = sorted({".".join(key.split(".")[:2]) for key in fresh if key not in run.weights})
    logging.info("a checkpoint of another kind: its weights are kept; fresh: %s", ", ".join(added) or "nothing")

    state = run.training_state(model)
    adapted["ema"] = state.average_for(model, adapted["state_dict"], ema.decay) if ema is not None else None
    if optimizer is None:
        return {key: value for key, value in adapted.items() if key == "ema" or key not in KEYS}
    groups = _groups(model, optimizer)
    adapted["optimizer"] = state.optimizer_for(optimizer.state_dict(), groups, keep_rate=not restart)
    if restart:
        adapted.update(epoch=0, step=0, scheduler=None, best_val_metric=None, primary_metric=None)
    return adapted


def regrouped(checkpoint: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """A run's own checkpoint, its optimiser state in the groups that the run's optimiser has now.

    Which parameters have weight decay may have changed since the checkpoint was written. Then the state of each goes
    with it into its present group, and a group keeps its stored settings, such as the learning rate.

    Args:
        checkpoint: for which `is_of` is true; not changed.
        model: the unwrapped model.
        optimizer: of this run, in its fresh state.

    Returns:
        The checkpoint itself where the groups are of equal sizes, or where it is not known how they were made.
    """
    stored, fresh = checkpoint.get("optimizer"), optimizer.state_dict()
    before, now = ([len(group["params"]) for group in (s or fresh)["param_groups"]] for s in (stored, fresh))
    if before == now or len(before) != len(now):
        return checkpoint
    state = StoredRun(checkpoint).training_state(model, host_only=False)
    if state.stored_groups() is None:
        return checkpoint
    logging.info("the checkpoint's optimiser has other groups: it was made when other parameters had weight decay")
    moved = state.optimizer_for(fresh, _groups(model, optimizer), keep_rate=True)
    for group, former in zip(moved["param_groups"], stored["param_groups"], strict=True):
        group.update({key: value for key, value in former.items() if key != "params"})
    return {**checkpoint, "optimizer": moved}


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Parameter names in each of an optimiser's groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def carry_over(model: nn.Module, path: str | Path) -> None:
    """Load what a starting checkpoint's run added into a model that fine-tunes from it; the host loads the rest.

    A task whose noise head the checkpoint does not have gets the noise head of another task. Running scales start
    fresh, since the new run's noise may have another size.

    Raises:
        ConfigError: the backbone has been trained under a mask token that the model does not have, or the reverse.
    """
    weights = {key: value for key, value in StoredRun.read(path).weights.items() if key.startswith(ADDED)}
    check_same_form("model.finetune_config.starting_checkpoint", weights, model.state_dict())
    heads = {_within_task(key): value for key, value in weights.items() if ".noise_head." in key}
    carried = set()
    for key, own in model.state_dict().items():
        if not key.startswith(ADDED) or ".scale." in key:
            continue
        stored = weights.get(key, heads.get(_within_task(key)) if ".noise_head." in key else None)
        if stored is not None and stored.shape == own.shape:
            own.copy_(stored)
            carried.add(".".join(key.split(".")[:3]))
    if carried:
        logging.info("from the starting checkpoint besides: %s", ", ".join(sorted(carried)))


def _taken_out(key: str, model: nn.Module) -> bool:
    """Whether a weight is of a part that is None in the model, such as output layers of PaiNN that no head reads."""
    module: nn.Module | None = model
    for name in key.split(".")[:-1]:
        module = module._modules.get(name, model)
        if module is None or module is model:
            return module is None
    return False


def _within_task(key: str) -> str:
    """The rest of `denoising.<task>.<module>.<rest>`."""
    return key.split(".", 3)[-1]
