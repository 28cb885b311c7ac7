"""The host's batch: as tasks see it, and as a pass sees it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import Task
from torch import Tensor

from fairchem_scd.denoising.plan import Pass
from fairchem_scd.denoising.structures import Structures

_OF_A_PASS = ("scatter_target", "gp_ctx", "node_partition")
"""What the host's backbone writes into its batch and reads again where it finds it there."""


def structures_of(data: AtomicData, pbc: Tensor, tasks: Iterable[Task]) -> Structures:
    """What denoising tasks see of a collated batch of B structures, or of one row.

    Args:
        data: the batch; nothing of it is changed.
        pbc: [B, 3] bool, the directions in which the model repeats the structures.
        tasks: the host's, which say under which names forces and stress are kept.
    """
    tasks = tuple(tasks)
    return Structures(
        ids=identities(data),
        natoms=data.natoms.view(-1).cpu(),
        pos=data.pos.detach().cpu(),
        fixed=data.fixed.view(-1).cpu() != 0,
        tags=data.tags.view(-1).cpu(),
        forces=_label(data, tasks, "forces"),
        stress=_label(data, tasks, "stress"),
        cell=data.cell.detach().cpu(),
        pbc=pbc.cpu(),
    )


def identities(data: AtomicData) -> list[str]:
    """A name for each structure of a batch, made of its contents: elements, positions and cell.

    The host numbers the rows of most data, but drops the number before a batch is made, and two data sets would have
    the same numbers. The contents are the same on any rank and in any batch, and after a restart.
    """
    cells = data.cell.detach().cpu().numpy()
    atoms = (data.atomic_numbers.detach().cpu().numpy(), data.pos.detach().cpu().numpy())
    names, start = [], 0
    for i, natoms in enumerate(data.natoms.view(-1).tolist()):
        digest = hashlib.blake2b(cells[i].tobytes(), digest_size=16)
        for values in atoms:
            digest.update(values[start : start + natoms].tobytes())
        names.append(digest.hexdigest())
        start += natoms
    return names


def view_of(data: AtomicData, run: Pass) -> AtomicData:
    """The batch as a pass sees it: an object of its own, which the backbone may write into.

    Positions and cell are tensors of their own, since conservative models make them require gradients.
    """
    view = copy.copy(data)
    view.__keys__ = set(data.keys())  # which the copy would share
    for key in _OF_A_PASS:
        if key in view:
            del view[key]
    view.pos, view.cell = run.pos.detach(), data.cell.detach()
    return view


def complete(data: AtomicData) -> None:
    """Write into a batch what the host's loss reads of what its backbone wrote: element references need it."""
    data.atomic_numbers_full, data.batch_full = data.atomic_numbers, data.batch


def _label(data: AtomicData, tasks: Iterable[Task], prop: str) -> Tensor | None:
    """A label that may be kept under several names, one for each data set; not finite where a structure has none.

    Where no task trains it, it is looked for under its own name. None if it is not there.
    """
    whole = None
    for name in [task.name for task in tasks if task.property == prop] or [prop]:
        if name in data:
            label = data[name].detach().cpu()
            whole = label if whole is None else torch.where(whole.isfinite(), whole, label)
    return whole
