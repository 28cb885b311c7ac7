"""The model of a checkpoint, and the weights that it predicts with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.checkpoint.source import check_weights, is_pretrained, model_config, source_weights, whole
from fairchem_scd.fairchem1.hydra import DenoisingHydra, freeze
from fairchem_scd.fairchem1.legacy import to_hydra

Weights = Literal["ema", "raw"]

OTHER_WEIGHTS = "the checkpoint's weights are not those of the model in its config"

MARK = "weights"
"""Key under which an exported checkpoint says which weights it holds."""


def build(checkpoint: Mapping[str, Any]) -> DenoisingHydra:
    """The model that a checkpoint is of, with fresh weights: of this package, of the plain host, or one-piece.

    Raises:
        ConfigError: its backbone has no adapter, its config cannot be built, or what it was fine-tuned from is gone.
    """
    found, overrides = whole(model_config(checkpoint))
    block, _ = to_hydra(found)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = DenoisingHydra(**{key: value for key, value in block.items() if key != "name"})
    except TypeError as error:
        raise ConfigError(f"the model in the checkpoint's config cannot be built here ({error})") from error
    for key, value in overrides.items():  # as the host does
        setattr(model.backbone, key, value)
    if is_pretrained(checkpoint) and model.adapter is not None:
        freeze(model)
    return model


def weights_held(checkpoint: Mapping[str, Any]) -> set[Weights]:
    """Which weights a checkpoint holds: "raw", as the optimiser left them, "ema", their moving average."""
    if checkpoint.get(MARK) is not None:
        return {checkpoint[MARK]}
    if checkpoint.get("ema") is not None:
        return {"raw", "ema"}
    # The host writes checkpoints without training state while the average stands in for the weights.
    averaged = "optimizer" not in checkpoint and (checkpoint["config"].get("optim") or {}).get("ema_decay")
    return {"ema"} if averaged else {"raw"}


def inference_weights(
    checkpoint: Mapping[str, Any], weights: Weights | None = None, *, model: DenoisingHydra | None = None
) -> dict[str, Tensor]:
    """The weights to predict with, by the names DenoisingHydra has for them.

    Args:
        checkpoint: of any kind that `build` knows.
        weights: one of `weights_held`; None: the average where the checkpoint has one.
        model: what `build` makes of the checkpoint, if it is at hand.

    Raises:
        ConfigError: the checkpoint does not hold these weights, or its weights or average are not those of its config.
    """
    raw, held = source_weights(checkpoint), weights_held(checkpoint)
    if weights is not None and weights not in held:
        raise ConfigError(
            "--weights ema: the checkpoint has no moving average (optim.ema_decay); leave --weights out"
            if weights == "ema"
            else "--weights raw: the checkpoint holds the moving average alone, as the host's best_checkpoint.pt does; "
            "checkpoint.pt of the same run has both"
        )
    model = model or build(checkpoint)
    check_weights(raw, model.state_dict(), OTHER_WEIGHTS)
    if weights == "raw" or held != {"raw", "ema"}:
        return raw
    parameters = dict(model.named_parameters())
    # The average is a list by position among trainable parameters, in the order of the source's own state_dict.
    names = [key for key in raw if key in parameters and parameters[key].requires_grad]
    values = checkpoint["ema"]["shadow_params"]
    if len(names) != len(values) or any(raw[n].shape != v.shape for n, v in zip(names, values, strict=True)):
        raise ConfigError("the checkpoint's moving average does not fit its weights; take --weights raw")
    # A module may lie in the model under two names, and either of them is the last to be loaded.
    same: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(p), []).append(name)
    averaged = dict(zip(names, values, strict=True))
    return {**raw, **{other: averaged[name] for name in names for other in same[id(parameters[name])]}}
