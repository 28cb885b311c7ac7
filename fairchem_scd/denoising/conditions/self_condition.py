"""The self-condition of SCD: the model's own embedding of a structure, on which a later pass is conditioned.

Everything about this condition is in this file: how it is made and given to the blocks, what replaces it in a pass
without a condition, which of its weights pre-training freezes, whether a model with it can be exported, and the names
of its weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fairchem_scd.denoising.conditions.modulation import BoundModulation, Modulation
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.errors import ConfigError

NullForm = Literal["identity", "mask_token"]
"""What a pass without a condition computes.

"identity": the host's plain backbone, exactly. "mask_token", the authors' form: in every such
pass the blocks get a learned token, so the model is never the plain one.
"""


class SelfCondition:
    """SCD's condition, over the two modules that hold its weights.

    One pass makes the embedding and a later pass is conditioned on it. Between the two the engine keeps it as a tensor
    with a row for each structure. A module of a task is known by its name in a checkpoint, `denoising.<task>.<name>.*`.

    Args:
        head: makes the embedding, and from it the condition.
        modulation: changes the blocks by the condition.
    """

    def __init__(self, head: ConditionHead, modulation: Modulation) -> None:
        self.head, self.modulation = head, modulation

    @classmethod
    def build(
        cls,
        channels: int,
        blocks: int,
        *,
        null_form: NullForm = "identity",
        gate_bound: float = 1.0,
    ) -> SelfCondition:
        """A condition with fresh weights, for a backbone with C l = 0 `channels` and some `blocks` to modulate."""
        head = ConditionHead(channels, mask_token=null_form == "mask_token")
        return cls(head, Modulation(channels, blocks, null=null_form, gate_bound=gate_bound))

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module]) -> SelfCondition | None:
        """The condition among a task's modules; None if the task has none."""
        if "condition_head" not in modules:
            return None
        return cls(modules["condition_head"], modules["modulation"])

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Its modules by their names in a checkpoint."""
        return {"condition_head": self.head, "modulation": self.modulation}

    @property
    def always_on(self) -> bool:
        """Whether blocks are modulated in every pass, also in one without a condition."""
        return self.head.mask_token is not None

    @property
    def frozen_in_pretraining(self) -> list[nn.Parameter]:
        """The parameters that pre-training must not move: the mask token, if there is one (as in the authors' code)."""
        return [self.head.mask_token] if self.always_on else []

    def embed(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        """Embed the structures of a pass: [B, C] float32. See `ConditionHead.forward`."""
        return self.head(scalars, batch, size)

    def bind(self, embedding: Tensor, conditioned: Tensor, batch: Tensor) -> BoundModulation:
        """The modulation of a pass over B structures and N atoms.

        Args:
            embedding: [B, C] of each structure.
            conditioned: [B] bool, the structures that are conditioned on their embedding.
            batch: [N] the structure of each atom.
        """
        condition = self.head.condition(embedding, conditioned)
        return self.modulation.bind(condition[batch], conditioned[batch])

    def bind_nothing(self, batch: Tensor, size: int) -> BoundModulation | None:
        """The modulation of a pass in which none of `size` structures has a condition; None: the plain backbone."""
        if not self.always_on:
            return None
        conditioned = torch.zeros(size, dtype=torch.bool, device=batch.device)
        return self.bind(self.head.mask_token.expand(size, -1), conditioned, batch)


class ConditionHead(nn.Module):
    """Pool a structure's l = 0 features into an embedding c, and make c the condition of the blocks.

    c = MLP(Σ_i MLP(x_i)), steps 2 and 3 of SCD (arXiv 2603.17196). Statistics are float32 whatever the autocast.

    The authors' code can also pool by the mean and bound the elements of the condition. Neither would change anything
    here: a LayerNorm follows the sum, and the condition comes from one.

    Args:
        channels: number C of l = 0 features.
        mask_token: learn a token that stands for the embedding where there is none.
    """

    def __init__(self, channels: int, *, mask_token: bool = False) -> None:
        super().__init__()
        self.atoms = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(), nn.LayerNorm(channels)
        )
        self.structure = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, channels),
            nn.SiLU(),
            nn.LayerNorm(channels),
            nn.Linear(channels, channels),
        )
        self.norm = nn.LayerNorm(channels)
        self.mask_token = nn.Parameter(torch.randn(channels)) if mask_token else None

    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        """Embed.

        Args:
            scalars: [n, C] l = 0 features of atoms.
            batch: [n] the structure of each.
            size: number B of structures.

        Returns:
            [B, C] float32.
        """
        atoms = self.atoms(scalars).float()
        pooled = atoms.new_zeros(size, atoms.shape[1]).index_add_(0, batch, atoms)
        return self.structure(pooled).float()

    def condition(self, embedding: Tensor, conditioned: Tensor) -> Tensor:
        """The condition of each structure, as the blocks get it.

        Args:
            embedding: [B, C] from `forward`.
            conditioned: [B] bool. The rows of the other structures hold the mask token; without one they hold values
                that the blocks do not read.

        Returns:
            [B, C] float32.
        """
        if self.mask_token is not None:
            embedding = torch.where(conditioned[:, None], embedding, self.mask_token)
        return self.norm(embedding.float()).float()


def always_on(tasks: Iterable[SelfCondition | None]) -> SelfCondition | None:
    """The condition, of those of a model's tasks, that modulates blocks in passes without a condition too."""
    return next((condition for condition in tasks if condition is not None and condition.always_on), None)


def null_form(state_keys: Iterable[str]) -> NullForm | None:
    """The null form of the condition whose weights are in a state dict, by its keys; None: it has no condition."""
    names = {match[1] for key in state_keys if (match := re.search(r"(?:^|\.)denoising\.[^.]+\.(.+)", key))}
    if "condition_head.mask_token" in names:
        return "mask_token"
    return "identity" if any(name.startswith("modulation.") for name in names) else None


def check_exportable(state_keys: Iterable[str]) -> None:
    """Raise ConfigError unless the plain model computes what the model of a state dict does without a condition."""
    if null_form(state_keys) == "mask_token":
        raise ConfigError(
            f"trained with {key_of('scd', 'null_condition')}: mask_token, which stands for the condition in every "
            "pass: the plain model computes something else. Where this package is installed it works as it is"
        )


def check_same_form(key: str, source: Iterable[str], target: Iterable[str]) -> None:
    """Check that weights mean the same in the model that they are loaded into.

    The two null forms read the same weights in different ways, and one of them is never off.

    Args:
        key: where the config or command names the checkpoint; begins the message.
        source: keys of the checkpoint's state dict.
        target: keys of the model's state dict.

    Raises:
        ConfigError: the checkpoint's backbone was trained under a mask token that the model does not have, or the
            model has one that the checkpoint's condition was not trained with.
    """
    trained, wanted = null_form(source), null_form(target)
    if trained == "mask_token" and wanted != "mask_token":
        raise ConfigError(
            f"{key}: its backbone was trained under a mask token in every pass; keep it with "
            f"{key_of('scd', 'null_condition')}: mask_token (prob: 0 if SCD itself is to stop)"
        )
    if trained == "identity" and wanted == "mask_token":
        raise ConfigError(
            f"{key}: trained with {key_of('scd', 'null_condition')}: identity, and this config says mask_token; the "
            "two forms read their weights in different ways, so make them agree"
        )


def check_null_form(null_form: NullForm, *, gradient_forces: bool) -> None:
    """Check the null form against a model, and warn of what it means.

    Args:
        null_form: of the condition.
        gradient_forces: the model has heads whose forces are the gradient of the energy.

    Raises:
        ConfigError: such forces would not be the gradient.
    """
    if null_form == "identity":
        return
    if gradient_forces:
        raise ConfigError(
            "null_condition: mask_token: the token stands in every pass, and the gradient of the energy, which "
            "the forces are here, leaves out what it does to the blocks; use null_condition: identity"
        )
    logging.warning(
        "null_condition: mask_token: the token stands in every pass, so plain models and trainers of the host "
        "that start from this one leave something out"
    )
