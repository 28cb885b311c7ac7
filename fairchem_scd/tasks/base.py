"""The shape of a task: what it corrupts, which passes it asks of the model, and what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fairchem_scd.config import ConfigError, Settings
from fairchem_scd.corruption import Corruption

NOISE = "denoising_noise"
"""Key of the predicted noise, [N, 3] in units of the objective's `scale`, among the model's outputs."""

VALIDATION = -1
"""The step of validation: its noise is that of no training step, and the same in every epoch and run."""


@dataclass(frozen=True)
class Structures:
    """What a task may know of a batch of B structures and N atoms; CPU tensors, in the data's units.

    Attributes:
        ids: B names that tell the structures apart.
        natoms: [B].
        pos: [N, 3] Å.
        fixed: [N] bool.
        tags: [N], OC20's marks: 0 below the surface, 1 surface, 2 adsorbate.
        forces: [N, 3] eV/Å.
        stress: [B, 9] or [B, 3, 3].
        md: [B] bool, frames of molecular dynamics.
        skip_dens: [B] bool, structures the data itself excludes.
    """

    ids: Sequence[str]
    natoms: Tensor
    pos: Tensor
    fixed: Tensor
    tags: Tensor | None = None
    forces: Tensor | None = None
    stress: Tensor | None = None
    md: Tensor | None = None
    skip_dens: Tensor | None = None

    @property
    def batch(self) -> Tensor:
        """[N] the structure of each atom."""
        return torch.repeat_interleave(torch.arange(len(self.natoms)), self.natoms)


def structures_of(batch: Any) -> Structures:
    """What tasks see of a collated batch: any object with the host's attribute names."""

    def optional(key: str) -> Tensor | None:
        value = getattr(batch, key, None)
        return torch.as_tensor(value).cpu() if value is not None else None

    md, skip, tags = optional("md"), optional("skip_dens"), optional("tags")
    return Structures(
        ids=identities(batch),
        natoms=torch.as_tensor(batch.natoms).view(-1).cpu(),
        pos=batch.pos.cpu(),
        fixed=batch.fixed.view(-1).cpu() != 0,
        tags=tags.view(-1).long() if tags is not None else None,
        forces=optional("forces"),
        stress=optional("stress"),
        md=md.view(-1).bool() if md is not None else None,
        skip_dens=skip.view(-1).bool() if skip is not None else None,
    )


def require(label: Tensor | None, name: str, task: str) -> Tensor:
    """A label that a task cannot do without. Raises ConfigError where the data has none."""
    if label is None:
        raise ConfigError(f"task.denoising.{task} needs '{name}', which the data does not have")
    return label


def identities(batch: Any) -> list[str]:
    """`sid/fid` of each structure of a batch; `sid` alone where the data has no frames."""
    columns = []
    for key in ("sid", "fid"):
        column = getattr(batch, key, None)
        if column is not None:
            columns.append(column.view(-1).tolist() if isinstance(column, Tensor) else _flat(column))
    return ["/".join(map(str, names)) for names in zip(*columns, strict=True)]


def _flat(column: Any) -> list[Any]:
    values = column if isinstance(column, (list, tuple)) else [column]
    return [value.item() if isinstance(value, Tensor) else value for value in values]


@dataclass(frozen=True)
class Part:
    """Some of a batch's atoms, as a batch of their own with n atoms in the b structures that have any.

    Attributes:
        atoms: [n] row numbers in the whole batch.
        structures: [b] their structures' numbers in the whole batch.
        natoms: [b].
        batch: [n] numbers of their structures among the b.
    """

    atoms: Tensor
    structures: Tensor
    natoms: Tensor
    batch: Tensor

    @classmethod
    def of(cls, natoms: Tensor, chosen: Tensor) -> Part:
        """The part of the `chosen` [N] atoms of structures with `natoms` [B] atoms."""
        batch = torch.repeat_interleave(torch.arange(len(natoms)), natoms)
        structures, index, counts = batch[chosen].unique_consecutive(return_inverse=True, return_counts=True)
        return cls(chosen.nonzero()[:, 0], structures, counts, index)


@dataclass(frozen=True)
class Pass:
    """One run of the model over one view of the batch.

    Attributes:
        pos: [N, 3] positions of this view, Å.
        part: the atoms that this view has; None: all. A pass that runs the user's heads has all.
        encoding: arguments for the task's `encoding` module, whose result joins the node embedding; None: no condition.
        told: [B] bool, the structures whose blocks are told their embedding of the latest pass that embeds; None: no
            condition.
        outputs: run the user's own heads.
        embed: embed the structures, with the task's `condition_head`.
        noise: run the noise head.
        detach_embedding: no gradient through the embedding into this pass.
    """

    pos: Tensor
    part: Part | None = None
    encoding: tuple[Tensor, ...] | None = None
    told: Tensor | None = None
    outputs: bool = True
    embed: bool = False
    noise: bool = False
    detach_embedding: bool = False

    def to(self, device: torch.device) -> Pass:
        """The same pass on another device."""
        return _moved(self, device)


@dataclass(frozen=True)
class Plan:
    """What one call of the model does in a denoising step: the passes of one task, in order."""

    task: str
    passes: tuple[Pass, ...]

    def to(self, device: torch.device) -> Plan:
        """The same plan on another device."""
        return _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, tuple or dataclass with all its tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if is_dataclass(value):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


@dataclass(frozen=True)
class Objective:
    """What a denoising step trains.

    Attributes:
        coefficient: weight of the denoising term.
        scale: Å that one unit of the noise target stands for; None: what the task's `scale` module says.
        loss: the host's loss function for the noise as a term of its own, beside the ordinary loss. None: the noise
            takes the place of the forces on corrupted atoms, under the config's own force loss.
        outputs: outputs, besides forces, that train on corrupted structures; None: all of them.
        clean: the outputs are of the structures as they are, so they count as in an ordinary step.
    """

    coefficient: float
    scale: float | None
    loss: str | None = None
    outputs: frozenset[str] | None = None
    clean: bool = False


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


class Task(ABC):
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
    def tells_forces(self) -> bool:
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
