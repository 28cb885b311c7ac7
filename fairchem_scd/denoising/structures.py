"""What a task may know of a batch of structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.periodic import wrapped
from fairchem_scd.errors import ConfigError


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
        cell: [B, 3, 3] lattice vectors in rows, Å.
        pbc: [B, 3] bool, the directions in which the model repeats a structure; None: it repeats none.
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
    cell: Tensor | None = None
    pbc: Tensor | None = None

    @property
    def batch(self) -> Tensor:
        """[N] the structure of each atom."""
        return torch.repeat_interleave(torch.arange(len(self.natoms)), self.natoms)

    def displaced(self, noise: Tensor) -> Tensor:
        """[N, 3] positions after displacements [N, 3], Å; inside the cell where structures are periodic."""
        pos = self.pos + noise
        if self.cell is None or self.pbc is None:
            return pos
        return wrapped(pos, self.cell, self.pbc, self.batch)


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
        raise ConfigError(f"{key_of(task)} needs '{name}', which the data does not have")
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
