"""The model of a checkpoint, and the weights that it predicts with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from fairchem_scd.backbones import modernise
from fairchem_scd.checkpoint.source import is_pretrained, model_config, source_weights, whole
from fairchem_scd.config import ConfigError
from fairchem_scd.model import DenoisingHydra
from fairchem_scd.pretraining import freeze

Weights = Literal["ema", "raw"]


def build(checkpoint: Mapping[str, Any]) -> DenoisingHydra:
    """The model that a checkpoint is of, with fresh weights: of this package, of the plain host, or one-piece.

    Raises:
        ConfigError: its backbone has no adapter.
    """
    block, _ = modernise(whole(model_config(checkpoint)))
    model = DenoisingHydra(**{key: value for key, value in block.items() if key != "name"})
    if is_pretrained(checkpoint) and model.adapter is not None:
        freeze(model)
    return model


def inference_weights(
    checkpoint: Mapping[str, Any], weights: Weights | None = None, *, model: DenoisingHydra | None = None
) -> dict[str, Tensor]:
    """The weights to predict with, by the names DenoisingHydra has for them.

    Args:
        checkpoint: of any kind that `build` knows.
        weights: "ema", the moving average; "raw", the weights as the optimiser left them; None: the average where the
            checkpoint has one.
        model: what `build` makes of the checkpoint, if it is at hand.

    Raises:
        ConfigError: the checkpoint does not hold these weights, or its average does not fit them.
    """
    raw, average = source_weights(checkpoint), checkpoint.get("ema")
    # The host writes checkpoints without training state while the average stands in for the weights.
    averaged = "optimizer" not in checkpoint and "ema" not in checkpoint and _had_average(checkpoint)
    if weights == "ema" and average is None and not averaged:
        raise ConfigError("--weights ema: the run kept no moving average (optim.ema_decay); leave it out")
    if weights == "raw" and averaged:
        raise ConfigError(
            "--weights raw: the checkpoint holds the moving average alone, as the host's best_checkpoint.pt does; "
            "checkpoint.pt of the same run has both"
        )
    if weights == "raw" or average is None:
        return raw
    parameters = dict((model or build(checkpoint)).named_parameters())
    # The average is a list by position among trainable parameters, in the order of the source's own state_dict.
    names = [key for key in raw if key in parameters and parameters[key].requires_grad]
    values = average["shadow_params"]
    if len(names) != len(values) or any(raw[n].shape != v.shape for n, v in zip(names, values, strict=True)):
        raise ConfigError("the checkpoint's moving average does not fit its weights; take --weights raw")
    return {**raw, **dict(zip(names, values, strict=True))}


def _had_average(checkpoint: Mapping[str, Any]) -> bool:
    return bool((checkpoint["config"].get("optim") or {}).get("ema_decay"))
