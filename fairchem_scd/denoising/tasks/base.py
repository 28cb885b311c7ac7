"""The shape of a task: what it corrupts, which passes it asks of the model, and what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fairchem_scd.denoising.conditions import SelfCondition
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import Objective, Pass
from fairchem_scd.denoising.running_scale import RunningScale
from fairchem_scd.denoising.settings import Settings
from fairchem_scd.denoising.structures import Structures, require
from fairchem_scd.errors import ConfigError


class Backbone(Protocol):
    """What a task may know of the backbone that it adds modules to.

    Attributes:
        encoding_spec: arguments of ForceEncoding that depend on the backbone.
        scalar_channels: number of its l = 0 features.
        num_modulated: number of blocks that a condition can modulate.
        conservative: its forces are the gradient of the energy.
    """

    encoding_spec: Mapping[str, Any]
    scalar_channels: int
    num_modulated: int
    conservative: bool

    def vector_head(self) -> nn.Module:
        """Another instance of the backbone's own force head."""


class TaskModules(nn.ModuleDict):
    """What a task adds to the model. A checkpoint has each under `denoising.<task>.<key>`.

    Keys:
        noise_head: a vector head, for the passes with `noise`.
        condition_head, modulation: of the condition, for the passes with `embed` and `conditioned`.
        encoding: called with a pass's `encoding`, it returns [N, Σ(lmax+1)², C].
        scale: where the noise's unit is not known beforehand.

    Args:
        noise_head, encoding, scale: as above; None: the task has none.
        condition: whose modules are added under their own keys.
        others: further modules, by key.
    """

    def __init__(
        self,
        noise_head: nn.Module,
        *,
        condition: SelfCondition | None = None,
        encoding: nn.Module | None = None,
        scale: RunningScale | None = None,
        **others: nn.Module,
    ) -> None:
        super().__init__({"noise_head": noise_head})
        self.update(condition.modules if condition is not None else {})
        self.update({key: m for key, m in {"encoding": encoding, "scale": scale, **others}.items() if m is not None})

    @classmethod
    def of(cls, modules: nn.ModuleDict) -> TaskModules:
        """The modules of a task that returns a plain ModuleDict with these keys, in its order."""
        if isinstance(modules, TaskModules):
            return modules
        made = cls(modules["noise_head"])
        made.clear()
        made.update(modules)
        return made

    @property
    def condition(self) -> SelfCondition | None:
        """The condition; None: the task has none."""
        return SelfCondition.of(self)

    @property
    def running_scale(self) -> RunningScale | None:
        """The unit of the noise target where an objective says None; None: it is always known."""
        return self["scale"] if "scale" in self else None  # noqa: SIM401 (a ModuleDict has no `get`)


class DenoisingTask(ABC):
    """A denoising task. docs/adding-a-task.md writes one from nothing.

    Nothing outside a task's own file asks for what it alone has: all that trainers, models and commands need to know of
    it is said by the members below.

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
        """Whether a pass is conditioned on forces, which takes a backbone with vector features."""
        return False

    @property
    def subset_settings(self) -> Sequence[str]:
        """The settings in use that ask for a pass over some of the atoms only, by key."""
        return ()

    @property
    def embeds_subset(self) -> bool:
        """Whether `embedding_pass` has some of the atoms only."""
        return False

    @property
    def judges_condition(self) -> bool:
        """Whether validation measures what the embedding of a structure tells the noisy pass: see `ConditionJudge`."""
        return False

    def check(self, outputs: Collection[str], trained: Collection[str]) -> None:  # noqa: B027 (optional)
        """Check the config against what the task trains.

        Args:
            outputs: names of the config's outputs.
            trained: names of the outputs that have a loss function.

        Raises:
            ConfigError: names the key that is missing or unknown.
        """

    def check_backbone(self, backbone: Backbone, heads: bool) -> None:  # noqa: B027 (optional)
        """Check the settings against the model that the task's modules will be added to.

        Args:
            backbone: its adapter.
            heads: whether the model has heads of the user's.

        Raises:
            ConfigError: names the setting and what it would have to be.
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
                f"{key_of(self.name)}: every atom of the {len(sample)} structures {origin} is fixed, so none "
                "may move; set all_atoms: true to move fixed atoms too"
            )
        if all(len(s.pos) == 1 for s in movable):
            raise ConfigError(
                f"{key_of(self.name)}: the {len(sample)} structures {origin} have one atom each, whose noise "
                f"nobody can know; make larger cells of them (on fairchem 1.x {key_of('repeat_cells')} does)"
            )

    @abstractmethod
    def modules(self, backbone: Backbone) -> TaskModules:
        """What the task adds to the model: fresh modules for a backbone."""

    @abstractmethod
    def corrupt(self, structures: Structures, *, seed: int, step: int) -> Corruption:
        """Draw the noise of a step. The same for equal arguments, whatever other structures are in the batch."""

    @abstractmethod
    def passes(self, structures: Structures, corruption: Corruption, *, seed: int, step: int) -> tuple[Pass, ...]:
        """The passes of a step over corrupted structures. One of them, and no more, has `noise`."""

    @abstractmethod
    def objective(self, progress: float) -> Objective:
        """What to train; `progress` is the share of the training steps done, 0 to 1."""

    def embedding_pass(self, structures: Structures) -> Pass:
        """The pass that embeds structures as they are. Only asked of a task whose modules have a condition."""
        return Pass(structures.pos, outputs=False, embed=True)

    def embedded_structures(self, structures: Structures) -> Tensor:
        """[B] bool: the structures that `embedding_pass` embeds."""
        return torch.ones(len(structures.natoms), dtype=torch.bool)

    def _force_encoding(self, structures: Structures, corruption: Corruption) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of a ForceEncoding that tells corrupted atoms their forces in the original structure.

        An atom is told nothing where its force is not finite, which is how hosts mark a label that is missing.
        """
        forces = require(structures.forces, "forces", self.name)
        known = forces.isfinite().all(dim=-1)
        told = torch.where(known[:, None], forces, 0.0)
        return told, corruption.mask & known, corruption.sigma[corruption.batch]
