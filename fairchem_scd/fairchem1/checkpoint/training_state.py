"""Optimiser state and moving average of a stored run, by the names of the parameters that they are of.

The host stores both by position among the parameters of the model that was trained. Positions are read here by the rule
that the run's own trainer had, and written by the rule of the model that trains on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.hydra import no_weight_decay_names

if TYPE_CHECKING:
    from fairchem_scd.fairchem1.checkpoint.stored_run import StoredRun

ADDED = "denoising."
"""Prefix of all that this package adds to a model."""

KEYS = ("ema", "optimizer", "scheduler", "epoch", "step", "best_val_metric", "primary_metric")
"""Of a checkpoint, the keys that only a run that goes on needs."""


class TrainingState:
    """Made by `StoredRun.training_state`.

    Args:
        run: the source.
        model: with the host's parameters of the run; with the added ones too, unless `host_only`.
        host_only: leave the parameters out that this package added. A model with other tasks has others.
    """

    def __init__(self, run: StoredRun, model: nn.Module, *, host_only: bool) -> None:
        self.run, self.model = run, model
        parameters = {name: p for name, p in model.named_parameters() if not (host_only and name.startswith(ADDED))}
        # A state_dict lists parameters in the order of named_parameters, which is the order of the stored lists.
        self.names = [key for key in run.weights if key in parameters]
        self.trainable = [key for key in self.names if parameters[key].requires_grad]
        # Added parameters come after the host's, so a stored list begins with the host's and may be longer.
        self.may_be_longer = host_only and any(key.startswith(ADDED) for key in run.weights)

    # --- moving average -------------------------------------------------------------------------------------------

    def average(self) -> dict[str, Tensor] | None:
        """The moving average by parameter name; None: the checkpoint has none, or it does not fit the weights."""
        state = self.run.checkpoint.get("ema")
        if state is None or not self._fits(state["shadow_params"], self.trainable):
            return None
        average = dict(zip(self.trainable, state["shadow_params"], strict=False))
        fits = all(value.shape == self.run.weights[name].shape for name, value in average.items())
        return average if fits else None

    def average_for(self, model: nn.Module, weights: Mapping[str, Tensor], decay: float) -> dict[str, Any] | None:
        """State of the host's moving average for another model.

        Args:
            model: with its trainable parameters as they will be trained.
            weights: by name; the average of a parameter that the run does not have begins here.
            decay: of the average.

        Returns:
            None where the run has no average, or one that does not fit its weights.
        """
        average = self.average()
        if average is None:
            if self.run.checkpoint.get("ema") is not None:
                logging.warning("the checkpoint's moving average does not fit its weights: the average starts fresh")
            return None
        known = {**weights, **average}
        shadow = [known[name] for name, parameter in model.named_parameters() if parameter.requires_grad]
        return {**self.run.checkpoint["ema"], "decay": decay, "shadow_params": shadow, "collected_params": []}

    # --- optimiser ------------------------------------------------------------------------------------------------

    def groups(self, no_weight_decay: Iterable[str], names: Sequence[str] | None = None) -> list[list[str]]:
        """Parameter names in each of the optimiser's groups, as the host's `load_optimizer` makes them.

        Args:
            no_weight_decay: endings of the names that go into a group without weight decay.
            names: of the parameters, in order; None: those of the run.
        """
        if len(self.run.checkpoint["optimizer"]["param_groups"]) == 1:
            return [self.names if names is None else list(names)]
        endings, names = tuple(no_weight_decay), self.trainable if names is None else names
        return [
            [name for name in names if name.endswith(endings)],
            [name for name in names if not name.endswith(endings)],
        ]

    def optimizer_for(self, fresh: dict[str, Any], groups: list[list[str]], *, keep_rate: bool) -> dict[str, Any]:
        """State of another optimiser: `fresh`, with the run's state for the parameters that the run has.

        Args:
            fresh: state_dict of that optimiser.
            groups: parameter names of its groups.
            keep_rate: take the run's learning rate too.

        Raises:
            ConfigError: one of them has weight decay, and the other has not.
        """
        state = self.run.checkpoint.get("optimizer")
        if state is None:
            logging.warning("the checkpoint has no optimiser state: the optimiser starts fresh")
            return fresh
        stored_groups = state["param_groups"]
        if len(stored_groups) != len(groups):
            raise ConfigError(
                "optim.optimizer_params.weight_decay: zero in one of checkpoint and config but not in the other, so "
                "the optimiser's groups differ; make them agree"
            )
        known = self._optimizer_state()
        if known is None:
            logging.warning("the checkpoint's optimiser state does not fit its weights: the optimiser starts fresh")
            return fresh
        names = {
            index: name
            for group, own in zip(fresh["param_groups"], groups, strict=True)
            for index, name in zip(group["params"], own, strict=True)
        }
        merged = [dict(group) for group in fresh["param_groups"]]
        if keep_rate:
            # The rate and its base belong to the scheduler's state; everything else is for the new config to say.
            for group, stored in zip(merged, stored_groups, strict=True):
                group.update({key: stored[key] for key in ("lr", "initial_lr") if key in stored})
        kept = {index: known[name] for index, name in names.items() if name in known}
        return {**fresh, "state": kept, "param_groups": merged}

    def _optimizer_state(self) -> dict[str, Any] | None:
        """The optimiser's state by parameter name; None: it does not fit the weights."""
        state, groups = self.run.checkpoint["optimizer"], self.stored_groups()
        if groups is None:
            return None
        pairs = zip(state["param_groups"], groups, strict=True)
        return {
            name: state["state"][index]
            for group, names in pairs
            for index, name in zip(group["params"], names, strict=False)
            if index in state["state"]
        }

    def stored_groups(self) -> list[list[str]] | None:
        """Parameter names in each group of the stored state; None: it does not fit the weights.

        The run chose them by the present rule of weight decay, or, if it is older, by the former one.
        """
        run, stored = self.run, self.run.checkpoint["optimizer"]["param_groups"]
        for former in (False, True):
            spared = no_weight_decay_names(
                self.model, legacy=run.decays_as_legacy, self_supervised=run.is_pretrained, former=former
            )
            groups = self.groups(spared)
            if all(self._fits(group["params"], names) for group, names in zip(stored, groups, strict=True)):
                return groups
        return None

    def _fits(self, values: list[Any], names: list[str]) -> bool:
        return len(values) >= len(names) if self.may_be_longer else len(values) == len(names)
