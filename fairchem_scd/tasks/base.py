"""The shape of a task: what it corrupts, which passes it asks of the model, and what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fairchem_scd.config import Settings
from fairchem_scd.corruption import Corruption

NOISE = "denoising_noise"
"""Key of the predicted noise, [N, 3] in units of the objective's `scale`, among the model's outputs."""


@dataclass(frozen=True)
class Structures:
    """What a task may know of a batch of B structures and N atoms; CPU tensors, in the data's units.

    Attributes:
        ids: B names that tell the structures apart.
        natoms: [B].
        pos: [N, 3] Å.
        fixed: [N] bool.
        forces: [N, 3] eV/Å.
        stress: [B, 9] or [B, 3, 3].
        md: [B] bool, frames of molecular dynamics.
        skip_dens: [B] bool, structures the data itself excludes.
    """

    ids: Sequence[str]
    natoms: Tensor
    pos: Tensor
    fixed: Tensor
    forces: Tensor | None = None
    stress: Tensor | None = None
    md: Tensor | None = None
    skip_dens: Tensor | None = None


def structures_of(batch: Any) -> Structures:
    """What tasks see of a collated batch: any object with the host's attribute names."""

    def optional(key: str) -> Tensor | None:
        value = getattr(batch, key, None)
        return torch.as_tensor(value).cpu() if value is not None else None

    md, skip = optional("md"), optional("skip_dens")
    return Structures(
        ids=identities(batch),
        natoms=batch.natoms.view(-1).cpu(),
        pos=batch.pos.cpu(),
        fixed=batch.fixed.view(-1).cpu() != 0,
        forces=optional("forces"),
        stress=optional("stress"),
        md=md.view(-1).bool() if md is not None else None,
        skip_dens=skip.view(-1).bool() if skip is not None else None,
    )


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
class Pass:
    """One run of the model over one view of the batch.

    Attributes:
        pos: [N, 3] positions of this view, Å.
        encoding: arguments for the task's `encoding` module, whose result joins the node embedding; None: no condition.
        outputs: run the user's own heads.
        noise: run the noise head.
    """

    pos: Tensor
    encoding: tuple[Tensor, ...] | None = None
    outputs: bool = True
    noise: bool = False

    def to(self, device: torch.device) -> Pass:
        encoding = self.encoding
        if encoding is not None:
            encoding = tuple(t.to(device, non_blocking=True) for t in encoding)
        return replace(self, pos=self.pos.to(device, non_blocking=True), encoding=encoding)


@dataclass(frozen=True)
class Plan:
    """What one call of the model does in a denoising step: the passes of one task, in order."""

    task: str
    passes: tuple[Pass, ...]

    def to(self, device: torch.device) -> Plan:
        """The same plan on another device."""
        return replace(self, passes=tuple(p.to(device) for p in self.passes))


@dataclass(frozen=True)
class Objective:
    """What a denoising step trains.

    Attributes:
        coefficient: weight of the denoising term.
        scale: Å that one unit of the noise target stands for.
        loss: the host's loss function for the noise as a term of its own, beside the ordinary loss. None: the noise
            takes the place of the forces on corrupted atoms, under the config's own force loss.
        outputs: outputs, besides forces, that train on corrupted structures; None: all of them.
    """

    coefficient: float
    scale: float
    loss: str | None = None
    outputs: frozenset[str] | None = field(default=None)


class Task(ABC):
    """A denoising task.

    Class attributes:
        name: key in the `task.denoising` block, and of what the task adds to the model (`denoising.<name>`).
        Settings: its settings class.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]]

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def labels(self) -> frozenset[str]:
        """Labels the data must carry."""
        return frozenset()

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

    @abstractmethod
    def modules(self, spec: Mapping[str, Any], vector_head: Callable[[], nn.Module]) -> nn.ModuleDict:
        """What the task adds to the model: `noise_head`, and `encoding` if its passes are told anything.

        Args:
            spec: arguments of `ForceEncoding` that depend on the backbone.
            vector_head: makes another instance of the backbone's own force head.
        """

    @abstractmethod
    def corrupt(self, structures: Structures, *, seed: int, step: int) -> Corruption:
        """Draw the noise of a step."""

    @abstractmethod
    def passes(self, structures: Structures, corruption: Corruption) -> tuple[Pass, ...]:
        """The passes of a step over corrupted structures."""

    @abstractmethod
    def objective(self, progress: float) -> Objective:
        """What to train; `progress` is the share of training done, 0 to 1."""
