"""Neighbours of structures that come again and again, found once with a margin. The same edges, at less cost."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from fairchem.core.common.utils import radius_graph_pbc
from fairchem.core.models.base import GraphData
from fairchem.core.models.esen.esen import eSEN_Backbone
from torch import Tensor

MARGIN = 1.0
"""Å added to the cutoff. What was found holds until an atom has moved by half of it."""


@dataclass(frozen=True)
class _Found:
    """Candidates of one structure: its positions and cell when found, edges [2, E] and their cell offsets [E, 3]."""

    pos: Tensor
    cell: Tensor
    edges: Tensor
    offsets: Tensor


class KeptNeighbors:
    """Takes the place of a backbone's `generate_graph` for small data that is seen many times, on the CPU.

    On bulk metals of 50 atoms the host's search takes a third of a step of a small PaiNN.

    Args:
        backbone: with `cutoff` in Å and `max_neighbors`, which must not cut any.
    """

    def __init__(self, backbone: Any) -> None:
        self.cutoff, self.most = backbone.cutoff, backbone.max_neighbors
        self.in_dict = isinstance(backbone, eSEN_Backbone)
        self._found: dict[tuple[int, int], _Found] = {}  # by name and number of atoms
        backbone.generate_graph = self

    def __call__(self, data: Any, **ignored: Any) -> GraphData | dict[str, Any]:
        """The graph of a batch, as the backbone's own `generate_graph` returns it.

        Raises:
            ValueError: an atom has more neighbours than the backbone takes.
        """
        counts = data.natoms.tolist()
        found, crossed = self._of(data, counts)
        firsts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        edges = torch.cat([f.edges + first for f, first in zip(found, firsts, strict=False)], dim=1)
        offsets = torch.cat([f.offsets for f in found]) - crossed[edges[0]] + crossed[edges[1]]
        structure = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor([f.edges.shape[1] for f in found]))
        shifts = torch.einsum("ei,eij->ej", offsets, data.cell[structure])
        vectors = data.pos[edges[0]] - data.pos[edges[1]] + shifts
        distances = vectors.norm(dim=1)
        near = ((distances < self.cutoff) & (distances > 0)).nonzero()[:, 0]
        if len(near) and int(torch.bincount(edges[1, near]).max()) > self.most:
            raise ValueError(f"an atom has more than {self.most} neighbours within {self.cutoff} Å")
        graph = GraphData(
            edge_index=edges[:, near],
            edge_distance=distances[near],
            edge_distance_vec=vectors[near],
            cell_offsets=offsets[near],
            offset_distances=shifts[near],
            neighbors=torch.bincount(structure[near], minlength=len(counts)),
            batch_full=data.batch,
            atomic_numbers_full=data.atomic_numbers.long(),
        )
        return vars(graph) if self.in_dict else graph

    def _of(self, data: Any, counts: list[int]) -> tuple[list[_Found], Tensor]:
        """The candidates of each structure, found now where they are not known or hold no more.

        Returns:
            They, and by how many lattice vectors each atom is away from where it was when they were found, [N, 3]:
            corrupted positions come back into the cell.
        """
        keys = list(zip(map(int, data.sid), counts, strict=True))
        pos = data.pos.detach()
        pbc = data.pbc.view(-1, 3) if "pbc" in data else torch.ones(len(counts), 3, dtype=torch.bool)
        if all(key in self._found for key in keys):
            known = [self._found[key] for key in keys]
            moved = pos - torch.cat([f.pos for f in known])
            along = torch.linalg.pinv(data.cell) * pbc[:, None]  # a structure that does not repeat may have no cell
            crossed = torch.einsum("ni,nij->nj", moved, along[data.batch]).round()
            moved = moved - torch.einsum("ni,nij->nj", crossed, data.cell[data.batch])
            if moved.norm(dim=1).max() <= MARGIN / 2 and torch.equal(data.cell, torch.stack([f.cell for f in known])):
                return known, crossed
        for key, part, cell, periodic in zip(keys, pos.split(counts), data.cell, pbc, strict=True):
            self._found[key] = self._find(part, cell, periodic)
        return [self._found[key] for key in keys], torch.zeros_like(pos)

    def _find(self, pos: Tensor, cell: Tensor, pbc: Tensor) -> _Found:
        one = SimpleNamespace(pos=pos, cell=cell[None], pbc=pbc[None], natoms=torch.tensor([len(pos)]))
        edges, offsets, _ = radius_graph_pbc(one, self.cutoff + MARGIN, 10**6, False)
        return _Found(pos.clone(), cell.clone(), edges, offsets.float())
