"""What is known of a run from a checkpoint that it stored, whichever kind of model it trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from fairchem.core.models.base import HydraModel
from torch import Tensor

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import adapter_for
from fairchem_scd.fairchem1.checkpoint.files import read
from fairchem_scd.fairchem1.checkpoint.training_state import TrainingState
from fairchem_scd.fairchem1.config import is_self_supervised
from fairchem_scd.fairchem1.hydra import DenoisingHydra, freeze
from fairchem_scd.fairchem1.legacy import hydra_key, to_hydra
from fairchem_scd.fairchem1.old_configs import with_model_block

Weights = Literal["ema", "raw"]
Hydra = TypeVar("Hydra", bound=HydraModel)

WEIGHTS_KEY = "weights"
"""Key under which an exported checkpoint says which weights it holds."""

# Overrides of fine-tuning that mean the same as arguments of the backbone. The host sets all overrides as attributes of
# the finished backbone, where others, such as a cutoff, come too late for what was built with them.
_SAME_AS_ARGUMENTS = {"max_neighbors", "use_pbc", "use_pbc_single", "otf_graph", "enforce_max_neighbors_strictly"}
_SAME_AS_ARGUMENTS |= {"regress_forces", "direct_forces", "activation_checkpoint"}


class StoredRun:
    """A run, as one of its checkpoints describes it: of this package, of the plain host, or of a legacy model.

    Weights, moving average and optimiser state go by the names that DenoisingHydra has for the parameters.

    Args:
        checkpoint: as `read` returns it. It is not changed.

    Attributes:
        config: the run's config, its model as a block also where it was written before fairchem 1.0.
        stored_keys: for each key of `weights`, in their order, the key in the checkpoint, without `module.`.
        is_legacy: it trained a legacy model, which has backbone and heads in one.
        is_pretrained: it trained no outputs. Its element embeddings were frozen, and it has no heads.
        decays_as_legacy: its optimiser chose the parameters without weight decay by the legacy model's rule.
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.config = with_model_block(checkpoint["config"])
        self.stored_keys = [_without_wrappers(key) for key in checkpoint["state_dict"]]
        self.is_legacy = not any(key.startswith("backbone.") for key in self.stored_keys)
        self.is_pretrained = is_self_supervised(self.config.get("outputs"), self.config.get("loss_functions"))
        self.decays_as_legacy = self.is_legacy or bool(self.model_block.get("legacy_weight_decay"))

    @classmethod
    def read(cls, path: str | Path) -> StoredRun:
        """The run of a checkpoint file. Raises FileNotFoundError or ConfigError, as `files.read`."""
        return cls(read(path))

    # --- the model ------------------------------------------------------------------------------------------------

    @property
    def model_block(self) -> dict[str, Any]:
        """The config's `model` block as the run had it."""
        return self.config["model"]

    @cached_property
    def _resolved(self) -> tuple[dict[str, Any], dict[str, Any]]:
        model = dict(self.model_block)
        tuning = model.pop("finetune_config", None)
        if tuning is None:
            return model, {}
        try:
            start = StoredRun.read(tuning["starting_checkpoint"])
        except FileNotFoundError as error:
            raise ConfigError(
                f"the checkpoint was fine-tuned from {error.filename}, and only that file says what its backbone is; "
                "put it there, or take what `fairchem-scd export` wrote"
            ) from error
        inherited = dict(start.whole_model_block)
        overrides = {} if model.get("backbone") is not None else dict(start.backbone_overrides)
        for key, value in (tuning.get("override") or {}).items():
            if key in _SAME_AS_ARGUMENTS:
                inherited["backbone"] = {**inherited["backbone"], key: value}
            else:
                overrides[key] = value
        return {**model, **{key: inherited[key] for key in ("backbone", "heads") if model.get(key) is None}}, overrides

    @property
    def whole_model_block(self) -> dict[str, Any]:
        """The `model` block with the backbone and heads that fine-tuning took from its starting checkpoint.

        Raises:
            ConfigError: the starting checkpoint is not there.
        """
        return copy.deepcopy(self._resolved[0])

    @property
    def backbone_overrides(self) -> dict[str, Any]:
        """What fine-tuning set on the finished backbone and arguments of the backbone cannot say."""
        return self._resolved[1]

    def build(self) -> DenoisingHydra:
        """The model that was trained, as a DenoisingHydra with fresh weights.

        Raises:
            ConfigError: its backbone has no adapter, its config cannot be built, or what it was fine-tuned from is
                gone.
        """
        block, _ = to_hydra(self.whole_model_block)
        model = build_hydra(DenoisingHydra, block)
        for key, value in self.backbone_overrides.items():
            setattr(model.backbone, key, value)
        if model.adapter is None and any(name not in self.weights for name in model.state_dict()):
            # Its backbone is that of a starting checkpoint, where a task had dropped them.
            adapter_for(model.backbone).drop_legacy_outputs()
        if self.is_pretrained and model.adapter is not None:
            freeze(model)
        return model

    # --- weights --------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weights as the checkpoint has them in `state_dict`, in its order."""
        named = [hydra_key(key) for key in self.stored_keys] if self.is_legacy else self.stored_keys
        return dict(zip(named, self.checkpoint["state_dict"].values(), strict=True))

    @property
    def kinds_of_weights(self) -> set[Weights]:
        """Which weights the checkpoint holds: "raw", as the optimiser left them, "ema", their moving average."""
        if self.checkpoint.get(WEIGHTS_KEY) is not None:
            return {self.checkpoint[WEIGHTS_KEY]}
        if self.checkpoint.get("ema") is not None:
            return {"raw", "ema"}
        # The host writes checkpoints without training state while the average stands in for the weights.
        averaged = "optimizer" not in self.checkpoint and (self.config.get("optim") or {}).get("ema_decay")
        return {"ema"} if averaged else {"raw"}

    def check_weights(self, model: DenoisingHydra) -> None:
        """Raise ConfigError unless the weights have the names and shapes of those of `model`, the run's own."""
        check_weights(
            self.weights, model.state_dict(), "the checkpoint's weights are not those of the model in its config"
        )

    def inference_weights(self, kind: Weights | None, model: DenoisingHydra) -> dict[str, Tensor]:
        """The weights to predict with.

        Args:
            kind: one of `kinds_of_weights`; None: the average where the checkpoint has one.
            model: from `build`.

        Raises:
            ConfigError: the checkpoint does not hold these weights, or its weights or average are not those of its
                config.
        """
        held = self.kinds_of_weights
        if kind is not None and kind not in held:
            raise ConfigError(
                "--weights ema: the checkpoint has no moving average (optim.ema_decay); leave --weights out"
                if kind == "ema"
                else "--weights raw: the checkpoint holds the moving average alone, as the host's best_checkpoint.pt "
                "does; checkpoint.pt of the same run has both"
            )
        self.check_weights(model)
        if kind == "raw" or held != {"raw", "ema"}:
            return self.weights
        average = self.training_state(model, host_only=False).average()
        if average is None:
            raise ConfigError("the checkpoint's moving average does not fit its weights; take --weights raw")
        return {**self.weights, **_under_all_names(average, model)}

    def training_state(self, model: torch.nn.Module, *, host_only: bool = True) -> TrainingState:
        """Optimiser state and moving average by name.

        Args:
            model: with the host's parameters of the run.
            host_only: those of the host's parameters alone; otherwise `model` must have the run's added ones too.
        """
        return TrainingState(self, model, host_only=host_only)


def build_hydra(cls: type[Hydra], block: Mapping[str, Any]) -> Hydra:
    """A hydra with fresh weights, the same at every call; the random state stays as it was.

    Args:
        cls: HydraModel or DenoisingHydra.
        block: the `model` block of a hydra, without `finetune_config`.

    Raises:
        ConfigError: the host's model does not take these arguments.
    """
    arguments = {key: value for key, value in copy.deepcopy(dict(block)).items() if key != "name"}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"the model in the checkpoint's config cannot be built here ({error})") from error


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise ConfigError, which begins with `what`, unless weights have the names and shapes of a model's."""
    report_weights(
        what,
        {
            "weights missing": [key for key in expected if key not in weights],
            "weights not in the model": [key for key in weights if key not in expected],
            "weights of another shape": [
                k for k, v in weights.items() if k in expected and v.shape != expected[k].shape
            ],
        },
    )


def report_weights(what: str, problems: Mapping[str, list[str]]) -> None:
    """Raise ConfigError where any list of weights has entries; the message begins with `what`.

    Args:
        what: what is wrong with the weights as a whole.
        problems: names of weights by what is wrong with each of them.
    """
    if any(problems.values()):
        raise ConfigError(
            f"{what}: " + "; ".join(f"{len(keys)} {how}, such as {keys[0]}" for how, keys in problems.items() if keys)
        )


def _without_wrappers(key: str) -> str:
    """The key of a weight without the `module.` that each wrapper for several processes puts before it."""
    while key.startswith("module."):
        key = key[len("module.") :]
    return key


def _under_all_names(values: Mapping[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """Values of parameters, repeated under each name that a parameter of several names has in the state dict."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters())
    return {other: value for name, value in values.items() for other in names[id(parameters[name])]}
