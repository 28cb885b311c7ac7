"""Checkpoints between kinds of model: plain host checkpoints to denoising ones, and back.

A host checkpoint stores the optimiser's state and the moving average by position among the parameters. Everything here
goes by name: positions are read with the rule the source model was trained under, and written under the target's.
"""

from __future__ import annotations

import copy
import errno
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from fairchem.core.models.base import HydraModel
from torch import Tensor, nn

from fairchem_scd.backbones import twin_key
from fairchem_scd.config import ConfigError
from fairchem_scd.model import undecayed
from fairchem_scd.pretraining import is_self_supervised

ADDED = "denoising."
"""Prefix of all that this package adds to a model."""

_TRAINING_STATE = {"optimizer", "scheduler", "epoch", "step", "best_val_metric", "primary_metric"}


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: the file is no fairchem checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "checkpoint file not found", str(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ConfigError(f"{path}: not a checkpoint, or cut short ({error})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "config"} <= set(checkpoint):
        raise ConfigError(f"{path}: not a fairchem checkpoint: it has no 'state_dict' and 'config'")
    return checkpoint


def is_of(checkpoint: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a checkpoint has exactly the weights of a model, and was trained by the same rule of weight decay."""
    legacy = bool(_model_config(checkpoint).get("legacy_weight_decay"))
    if _is_pretrained(checkpoint) != getattr(model, "self_supervised", False):
        return False
    theirs = {_bare(key): value.shape for key, value in checkpoint["state_dict"].items()}
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
    if _is_pretrained(checkpoint) != getattr(model, "self_supervised", False):
        words = ("without", "with") if _is_pretrained(checkpoint) else ("with", "without")
        raise ConfigError(
            f"--checkpoint: it is of a run {words[0]} outputs, and this is one {words[1]} them; start from its "
            "backbone instead: name it under model.finetune_config.starting_checkpoint, and leave model.backbone out"
        )
    adapted = dict(checkpoint)
    weights, fresh = source_weights(checkpoint), model.state_dict()
    _check_weights(weights, fresh)
    _check_null_condition("--checkpoint", weights, fresh)
    adapted["state_dict"] = {key: weights.get(key, value) for key, value in fresh.items()}
    added = sorted({".".join(key.split(".")[:2]) for key in fresh if key not in weights})
    logging.info("a checkpoint of another kind: its weights are kept; fresh: %s", ", ".join(added) or "nothing")

    source = _Source(checkpoint, model)
    adapted["ema"] = source.ema(_trainable(model), adapted["state_dict"], ema.decay) if ema is not None else None
    if optimizer is None:
        return {key: value for key, value in adapted.items() if key not in _TRAINING_STATE}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    adapted["optimizer"] = source.optimizer(optimizer.state_dict(), groups, keep_rate=not restart)
    if restart:
        adapted.update(epoch=0, step=0, scheduler=None, best_val_metric=None, primary_metric=None)
    return adapted


def to_plain(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of the plain host hydra, which fairchem loads and trains on without this package.

    Host weights keep their keys and values; optimiser state and moving average are kept for them.
    """
    if _is_pretrained(checkpoint):
        raise ConfigError(
            "a checkpoint of pre-training has no heads and predicts nothing; name it under "
            "model.finetune_config.starting_checkpoint and fine-tune"
        )
    if _has_mask_token(checkpoint["state_dict"]):
        raise ConfigError(
            "trained with task.denoising.scd.null_condition: mask_token, which stands for the condition in every pass: "
            "the plain model computes something else"
        )
    plain = dict(checkpoint)
    plain["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not _bare(k).startswith(ADDED)}
    config = copy.deepcopy(dict(checkpoint["config"]))
    if config["model"].get("legacy_weight_decay"):
        logging.info("the plain hydra chooses by another rule which parameters to decay than this run did")
    block = _whole(config["model"])
    for key in ("name", "denoising", "legacy_weight_decay"):
        block.pop(key, None)
    config["task"].pop("denoising", None)
    plain["config"] = {**config, "model": {**block, "name": "hydra"}}
    model = HydraModel(**block)
    source = _Source(checkpoint, model)
    if plain.get("ema") is not None:
        plain["ema"] = source.ema(_trainable(model), source_weights(checkpoint), plain["ema"]["decay"])
    if plain.get("optimizer") is not None:
        groups = source.groups(model.no_weight_decay())
        empty = {"state": {}, "param_groups": [dict(g) for g in plain["optimizer"]["param_groups"]]}
        start = 0
        for group, names in zip(empty["param_groups"], groups, strict=True):
            group["params"] = list(range(start, start + len(names)))
            start += len(names)
        plain["optimizer"] = source.optimizer(empty, groups, keep_rate=True)
    return plain


class _Source:
    """Training state of a checkpoint, by parameter name, for the host's own parameters.

    Args:
        checkpoint: the source.
        model: a model with the same host parameters, by DenoisingHydra's names.
    """

    def __init__(self, checkpoint: Mapping[str, Any], model: nn.Module) -> None:
        self.checkpoint, self.model = checkpoint, model
        parameters = {name: p for name, p in model.named_parameters() if not name.startswith(ADDED)}
        weights = source_weights(checkpoint)
        # The source's own order: a state_dict lists parameters as named_parameters does.
        self.order = [key for key in weights if key in parameters]
        self.trainable = [key for key in self.order if parameters[key].requires_grad]
        # Added parameters come after the host's, so the host's are a prefix of any list the source kept.
        self.has_more = any(key.startswith(ADDED) for key in weights)

    def groups(self, undecayed: Iterable[str]) -> list[list[str]]:
        """Names in each of the optimiser's groups, as the host's load_optimizer makes them."""
        if len(self.checkpoint["optimizer"]["param_groups"]) == 1:
            return [self.order]
        undecayed = tuple(undecayed)
        return [
            [name for name in self.trainable if name.endswith(undecayed)],
            [name for name in self.trainable if not name.endswith(undecayed)],
        ]

    def optimizer(self, fresh: dict[str, Any], groups: list[list[str]], *, keep_rate: bool) -> dict[str, Any]:
        """`fresh` with the source's state for the parameters it knows.

        Args:
            fresh: state_dict of the target's optimiser.
            groups: parameter names of its groups.
            keep_rate: take the learning rate over too.
        """
        state = self.checkpoint.get("optimizer")
        if state is None:
            logging.warning("the checkpoint has no optimiser state: the optimiser starts fresh")
            return fresh
        theirs = state["param_groups"]
        if len(theirs) != len(groups):
            raise ConfigError(
                "optim.optimizer_params.weight_decay: zero in one of checkpoint and config but not in the other, so "
                "the optimiser's groups differ; make them agree"
            )
        source_groups = self.groups(self._undecayed())
        if any(not self._fits(g["params"], names) for g, names in zip(theirs, source_groups, strict=True)):
            logging.warning("the checkpoint's optimiser state does not fit its weights: the optimiser starts fresh")
            return fresh
        known = {
            name: state["state"][index]
            for group, names in zip(theirs, source_groups, strict=True)
            for index, name in zip(group["params"], names, strict=False)
            if index in state["state"]
        }
        targets = {
            index: name
            for group, names in zip(fresh["param_groups"], groups, strict=True)
            for index, name in zip(group["params"], names, strict=True)
        }
        merged = [dict(group) for group in fresh["param_groups"]]
        if keep_rate:
            # The rate and its base go with the scheduler's state; the rest is the config's to say.
            for ours, group in zip(merged, theirs, strict=True):
                ours.update({key: group[key] for key in ("lr", "initial_lr") if key in group})
        kept = {index: known[name] for index, name in targets.items() if name in known}
        return {**fresh, "state": kept, "param_groups": merged}

    def ema(self, names: list[str], weights: Mapping[str, Tensor], decay: float) -> dict[str, Any] | None:
        """State of the host's moving average over `names`: the source's, begun at `weights` where it has none."""
        state = self.checkpoint.get("ema")
        if state is None:
            return None
        if not self._fits(state["shadow_params"], self.trainable):
            logging.warning("the checkpoint's moving average does not fit its weights: the average starts fresh")
            return None
        known = {**weights, **dict(zip(self.trainable, state["shadow_params"], strict=False))}
        return {**state, "decay": decay, "shadow_params": [known[name] for name in names], "collected_params": []}

    def _fits(self, values: list[Any], names: list[str]) -> bool:
        return len(values) >= len(names) if self.has_more else len(values) == len(names)

    def _undecayed(self) -> Iterable[str]:
        """The names that the source run's optimiser did not decay."""
        legacy = _is_one_piece(self.checkpoint) or bool(_model_config(self.checkpoint).get("legacy_weight_decay"))
        return undecayed(self.model, legacy=legacy, self_supervised=_is_pretrained(self.checkpoint))


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def carry_over(model: nn.Module, path: str | Path) -> None:
    """Load what a starting checkpoint's run added into a model that fine-tunes from it; the host carries the rest.

    A noise head goes to every task that has none of its own there. A running scale starts fresh: the noise is another.

    Raises:
        ConfigError: the backbone has been trained under a mask token that the model does not have, or the reverse.
    """
    weights = {k: v for k, v in source_weights(read(path)).items() if k.startswith(ADDED)}
    _check_null_condition("model.finetune_config.starting_checkpoint", weights, model.state_dict())
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


def what_next(folder: str, *, pretrained: bool = False) -> str:
    """What a user does with a finished run's checkpoints; a `pretrained` one predicts nothing yet."""
    best, last = (Path(folder) / name for name in ("best_checkpoint.pt", "checkpoint.pt"))
    found = f"  best on validation:   {best}\n" if best.is_file() else ""
    best = best if best.is_file() else last  # without validation there is no best
    calculator = "" if pretrained else f"  use it with ASE:     OCPCalculator(checkpoint_path='{best}')\n"
    return (
        f"Training is done.\n"
        f"{found}"
        f"  last, to resume from: {last}\n"
        f"Next:\n"
        f"{calculator}"
        f"  train it further:    fairchem --mode train --config-yml YOUR.yml --checkpoint {last}\n"
        f"  fine-tune from it:   model.finetune_config.starting_checkpoint: {best}"
    )


def source_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint by the names DenoisingHydra has for them, in the source's order."""
    weights = {_bare(key): value for key, value in checkpoint["state_dict"].items()}
    if _is_one_piece(checkpoint):
        weights = {twin_key(key): value for key, value in weights.items()}
    return weights


def _bare(key: str) -> str:
    while key.startswith("module."):
        key = key[len("module.") :]
    return key


def _model_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    model = checkpoint["config"].get("model")
    # Before fairchem 1.0: the name alone, and its arguments beside it.
    return model if isinstance(model, dict) else {"name": model}


def _whole(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model block with the backbone and heads that fine-tuning takes from its starting checkpoint."""
    model = dict(model)
    tuning = model.pop("finetune_config", None)
    if tuning is None:
        return model
    start = _whole(_model_config(read(tuning["starting_checkpoint"])))
    start["backbone"] = {**start["backbone"], **tuning.get("override", {})}
    return {**model, **{key: start[key] for key in ("backbone", "heads") if model.get(key) is None}}


def _has_mask_token(keys: Iterable[str]) -> bool:
    return any(key.endswith("condition_head.mask_token") for key in keys)


def _check_null_condition(key: str, weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
    """The two forms of modulation read the same weights in different ways, and one of them is never off."""
    source, target = _has_mask_token(weights), _has_mask_token(fresh)
    if source and not target:
        raise ConfigError(
            f"{key}: its backbone was trained under a mask token in every pass; keep it with "
            "task.denoising.scd.null_condition: mask_token (prob: 0 if SCD itself is to stop)"
        )
    if target and not source and any(".modulation." in name for name in weights):
        raise ConfigError(
            f"{key}: trained with task.denoising.scd.null_condition: identity, and this config says mask_token; the "
            "two forms read their weights in different ways, so make them agree"
        )


def _is_pretrained(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a self-supervised run wrote the checkpoint: its element embeddings were frozen, and it has no heads."""
    config = checkpoint["config"]
    return is_self_supervised(config.get("outputs"), config.get("loss_functions"))


def _is_one_piece(checkpoint: Mapping[str, Any]) -> bool:
    return not any(_bare(key).startswith("backbone.") for key in checkpoint["state_dict"])


def _check_weights(weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
    missing = [key for key in fresh if key not in weights and not key.startswith(ADDED)]
    unknown = [key for key in weights if key not in fresh and not key.startswith(ADDED)]
    shapes = [key for key, value in weights.items() if key in fresh and value.shape != fresh[key].shape]
    if missing or unknown or shapes:
        problems = (("missing", missing), ("not in the model", unknown), ("of another shape", shapes))
        raise ConfigError(
            "the checkpoint is of another model than the config's: "
            + "; ".join(f"{len(keys)} weights {what}, such as {keys[0]}" for what, keys in problems if keys)
        )
