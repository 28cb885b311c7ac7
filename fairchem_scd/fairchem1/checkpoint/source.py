"""What a checkpoint holds, whichever kind of run wrote it, by the names DenoisingHydra has for it.

A host checkpoint stores the optimiser's state and the moving average by position among the parameters. Everything here
goes by name: positions are read with the rule the source model was trained under, and written under the target's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.checkpoint.files import read
from fairchem_scd.fairchem1.config import is_self_supervised
from fairchem_scd.fairchem1.hydra import no_weight_decay_names
from fairchem_scd.fairchem1.legacy import hydra_key

ADDED = "denoising."
"""Prefix of all that this package adds to a model."""


class Source:
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

    def groups(self, no_weight_decay_names: Iterable[str]) -> list[list[str]]:
        """Names in each of the optimiser's groups, as the host's load_optimizer makes them."""
        if len(self.checkpoint["optimizer"]["param_groups"]) == 1:
            return [self.order]
        no_weight_decay_names = tuple(no_weight_decay_names)
        return [
            [name for name in self.trainable if name.endswith(no_weight_decay_names)],
            [name for name in self.trainable if not name.endswith(no_weight_decay_names)],
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
        legacy = is_legacy(self.checkpoint) or bool(model_config(self.checkpoint).get("legacy_weight_decay"))
        return no_weight_decay_names(self.model, legacy=legacy, self_supervised=is_pretrained(self.checkpoint))


def source_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint by the names DenoisingHydra has for them, in the source's order."""
    weights = {bare(key): value for key, value in checkpoint["state_dict"].items()}
    if is_legacy(checkpoint):
        weights = {hydra_key(key): value for key, value in weights.items()}
    return weights


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def bare(key: str) -> str:
    while key.startswith("module."):
        key = key[len("module.") :]
    return key


def model_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    model = checkpoint["config"].get("model")
    # Before fairchem 1.0: the name alone, and its arguments beside it.
    return model if isinstance(model, dict) else {"name": model}


# What the host sets as attributes on a finished backbone, and its constructor would have set to no other effect.
_PLAIN_OVERRIDES = {"max_neighbors", "use_pbc", "use_pbc_single", "otf_graph", "enforce_max_neighbors_strictly"}
_PLAIN_OVERRIDES |= {"regress_forces", "direct_forces", "activation_checkpoint"}


def whole(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model block with the backbone and heads that fine-tuning takes from its starting checkpoint.

    Returns:
        The block, and the overrides of `finetune_config` that are not the same as arguments of the backbone.

    Raises:
        ConfigError: the starting checkpoint is not there.
    """
    model = dict(model)
    tuning = model.pop("finetune_config", None)
    if tuning is None:
        return model, {}
    try:
        start, others = whole(model_config(read(tuning["starting_checkpoint"])))
    except FileNotFoundError as error:
        raise ConfigError(
            f"the checkpoint was fine-tuned from {error.filename}, and only that file says what its backbone is; put "
            "it there, or take what `fairchem-scd export` wrote"
        ) from error
    if model.get("backbone") is not None:
        others = {}
    for key, value in (tuning.get("override") or {}).items():
        if key in _PLAIN_OVERRIDES:
            start["backbone"] = {**start["backbone"], key: value}
        else:
            others = {**others, key: value}
    return {**model, **{key: start[key] for key in ("backbone", "heads") if model.get(key) is None}}, others


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise ConfigError, which begins with `what`, unless weights have the names and shapes of a model's."""
    problems = {
        "missing": [key for key in expected if key not in weights],
        "not in the model": [key for key in weights if key not in expected],
        "of another shape": [k for k, value in weights.items() if k in expected and value.shape != expected[k].shape],
    }
    if any(problems.values()):
        raise ConfigError(
            f"{what}: "
            + "; ".join(f"{len(keys)} weights {how}, such as {keys[0]}" for how, keys in problems.items() if keys)
        )


def is_pretrained(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a self-supervised run wrote the checkpoint: its element embeddings were frozen, and it has no heads."""
    config = checkpoint["config"]
    return is_self_supervised(config.get("outputs"), config.get("loss_functions"))


def is_legacy(checkpoint: Mapping[str, Any]) -> bool:
    return not any(bare(key).startswith("backbone.") for key in checkpoint["state_dict"])
