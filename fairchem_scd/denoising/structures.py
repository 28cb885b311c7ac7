"""What a task may know of a batch of structures."""

from __future__ import annotations

from collections import Counter
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
        ids: B different names, which key the random numbers of the structures.
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


def structures_of(batch: Any, pbc: Tensor | None = None) -> Structures:
    """What tasks see of a collated batch.

    Args:
        batch: any object with the host's attribute names.
        pbc: [B, 3] bool, the directions in which the model repeats each structure; None: it repeats none.
    """

    def optional(key: str) -> Tensor | None:
        value = getattr(batch, key, None)
        return torch.as_tensor(value).cpu() if value is not None else None

    natoms, pos = torch.as_tensor(batch.natoms).view(-1).cpu(), batch.pos.cpu()
    md, skip, tags, cell = optional("md"), optional("skip_dens"), optional("tags"), optional("cell")
    return Structures(
        ids=_all_different(identities(batch), pos, natoms),
        natoms=natoms,
        pos=pos,
        fixed=batch.fixed.view(-1).cpu() != 0,
        tags=tags.view(-1).long() if tags is not None else None,
        forces=optional("forces"),
        stress=optional("stress"),
        md=md.view(-1).bool() if md is not None else None,
        skip_dens=skip.view(-1).bool() if skip is not None else None,
        cell=cell.view(-1, 3, 3) if cell is not None else None,
        pbc=pbc,
    )


def require(label: Tensor | None, name: str, task: str) -> Tensor:
    """A label that a task cannot do without. Raises ConfigError where the data has none."""
    if label is None:
        raise ConfigError(f"{key_of(task)} needs '{name}', which the data does not have")
    return label


def names(batch: Any) -> list[str]:
    """What the data calls each structure of a batch: `sid/fid`, or `sid` alone where it has no frames."""
    return _joined(batch, ("sid", "fid"))


def identities(batch: Any) -> list[str]:
    """What tells each structure of a batch from all others of its data set.

    That is its name. The row's number joins it where the batch has that under `row_number`; the host fills that in for
    data sets in which rows share names. A row that stands in for a bad one says so under `stands_in_for`.
    """
    stand_ins = getattr(batch, "stands_in_for", None)
    joined = _joined(batch, ("sid", "fid", "row_number"))
    if stand_ins is None:
        return joined
    return [f"{name} for {bad}" if bad else name for name, bad in zip(joined, _flat(stand_ins), strict=True)]


def _joined(batch: Any, keys: Sequence[str]) -> list[str]:
    columns = []
    for key in keys:
        column = getattr(batch, key, None)
        if column is not None:
            columns.append(column.view(-1).tolist() if isinstance(column, Tensor) else _flat(column))
    return ["/".join(map(str, parts)) for parts in zip(*columns, strict=True)]


def _all_different(ids: Sequence[str], pos: Tensor, natoms: Tensor) -> Sequence[str]:
    """The identities, with a count joined to those that a batch has more than once.

    They are counted in the order of their positions, so that their order in the batch makes no difference.
    """
    if len(set(ids)) == len(ids):
        return ids
    different, seen, parts = list(ids), Counter[str](), pos.split(natoms.tolist())
    for row in sorted(range(len(ids)), key=lambda row: parts[row].tolist()):
        seen[ids[row]] += 1
        if seen[ids[row]] > 1:
            different[row] = f"{ids[row]} ({seen[ids[row]]})"
    return different


def _flat(column: Any) -> list[Any]:
    values = column if isinstance(column, (list, tuple)) else [column]
    return [value.item() if isinstance(value, Tensor) else value for value in values]
