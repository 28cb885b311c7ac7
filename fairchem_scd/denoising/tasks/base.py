"""The shape of a task: what it corrupts, which passes it asks of the model, and what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import Objective, Pass
from fairchem_scd.denoising.settings import Settings
from fairchem_scd.denoising.structures import Structures
from fairchem_scd.errors import ConfigError


class Backbone(Protocol):
    """What a task may know of the backbone that it adds modules to.

    Attributes:
        encoding_spec: arguments of ForceEncoding that depend on the backbone.
        scalar_channels: number of its l = 0 features.
        num_modulated: number of blocks that a condition can modulate.
    """

    encoding_spec: Mapping[str, Any]
    scalar_channels: int
    num_modulated: int

    def vector_head(self) -> nn.Module:
        """Another instance of the backbone's own force head."""


class DenoisingTask(ABC):
    """A denoising task.

    Class attributes:
        name: key in the `task.denoising` block, and of what the task adds to the model (`denoising.<name>`).
        Settings: its settings class.

    Args:
        settings: an instance of it.
        supervised: the config trains outputs beside the task.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]]

    def __init__(self, settings: Settings, supervised: bool = True) -> None:
        self.settings = settings
        self.supervised = supervised

    @property
    def labels(self) -> frozenset[str]:
        """Labels the data must carry."""
        return frozenset()

    @property
    def conditions_on_forces(self) -> bool:
        """Whether a pass is told forces, which takes a backbone with vector features."""
        return False

    def check(self, outputs: Collection[str], trained: Collection[str]) -> None:  # noqa: B027 (optional)
        """Check the config against what the task trains.

        Args:
            outputs: names of the config's outputs.
            trained: names of the outputs that have a loss function.

        Raises:
            ConfigError: names the key that is missing or unknown.
        """

    def movable(self, structures: Structures) -> Tensor:
        """[N] bool: the atoms that may move."""
        return torch.ones_like(structures.fixed) if self.settings.all_atoms else ~structures.fixed

    def check_sample(self, sample: Sequence[Structures], origin: str) -> None:
        """Check structures of the data, which are named in errors by their `origin`.

        Raises:
            ConfigError: none of them has anything to denoise.
        """
        movable = [s for s in sample if bool(self.movable(s).any())]
        if not movable:
            raise ConfigError(
                f"task.denoising.{self.name}: every atom of the {len(sample)} structures {origin} is fixed, so none "
                "may move; set all_atoms: true to move fixed atoms too"
            )
        if all(len(s.pos) == 1 for s in movable):
            raise ConfigError(
                f"task.denoising.{self.name}: the {len(sample)} structures {origin} have one atom each, whose noise "
                "nobody can know; task.denoising.repeat_cells makes more of small cells"
            )

    @abstractmethod
    def modules(self, backbone: Backbone) -> nn.ModuleDict:
        """What the task adds to the model.

        `noise_head`, and what its passes ask for: `encoding`; `condition_head` and `modulation`; `scale`.
        """

    @abstractmethod
    def corrupt(self, structures: Structures, *, seed: int, step: int) -> Corruption:
        """Draw the noise of a step."""

    @abstractmethod
    def passes(self, structures: Structures, corruption: Corruption, *, seed: int, step: int) -> tuple[Pass, ...]:
        """The passes of a step over corrupted structures."""

    @abstractmethod
    def objective(self, progress: float) -> Objective:
        """What to train; `progress` is the share of training done, 0 to 1."""
