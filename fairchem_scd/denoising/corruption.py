"""Corruption of structures: which atoms move, and how far. Pure functions on CPU tensors.

Random numbers come from a counter-based generator keyed by (seed, step, structure). So a structure gets the same noise
on any rank, after a restart, and whatever ran before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairchem_scd.denoising.random import stream


@dataclass(frozen=True)
class Corruption:
    """What was done to the atoms of a batch of B structures and N atoms.

    Attributes:
        noise: [N, 3] displacement ε in Å; zero where `mask` is False.
        mask: [N] bool, the atoms that moved.
        sigma: [B] standard deviation in Å that the structure's noise was drawn with; zero for structures left alone.
        batch: [N] the structure of each atom.
    """

    noise: Tensor
    mask: Tensor
    sigma: Tensor
    batch: Tensor

    @property
    def corrupted(self) -> Tensor:
        """[B] bool, the structures of which any atom moved."""
        return self.sigma > 0


def corrupt(
    natoms: Tensor,
    ids: Sequence[str],
    movable: Tensor,
    *,
    seed: int,
    step: int,
    sigmas: Sequence[float],
    ratio: float | None = None,
    excluded: Tensor | None = None,
    max_ratio: float | None = None,
) -> Corruption:
    """Draw Gaussian displacements for a batch.

    Args:
        natoms: [B] atoms of each structure; may be zero.
        ids: B names that tell the structures apart.
        movable: [N] bool, atoms that may move.
        seed, step: key of the random numbers.
        sigmas: standard deviations in Å; one is drawn for each structure.
        ratio: probability that an atom moves; None moves all.
        excluded: [B] bool, structures to leave alone.
        max_ratio: leave a structure alone if more than this share of its atoms was drawn to move. Atoms that may not
            move count, as in EquiformerV3's code.

    Where every atom of a structure moved, the mean displacement is removed, since no translation-invariant model can
    predict it. A structure of one atom then has nothing to denoise, and is left alone.
    """
    counts = natoms.tolist()
    batch = torch.repeat_interleave(torch.arange(len(counts)), natoms)
    noise, mask, sigma = [], [], []
    for n, name in zip(counts, ids, strict=True):
        rng = stream(seed, step, name)
        # Always all three draws, in this order: then a setting that is used for one of them does not change the others.
        sigma.append(sigmas[int(rng.random() * len(sigmas))])
        mask.append(rng.random(n) < (1.0 if ratio is None else ratio))
        noise.append(rng.standard_normal((n, 3), dtype=np.float32))
    drawn = torch.from_numpy(np.concatenate(mask))
    moved = drawn & movable
    if excluded is not None:
        moved &= ~excluded[batch]
    moved_count = torch.zeros_like(natoms).index_add_(0, batch, moved.to(natoms.dtype))
    alone = natoms == 1
    if max_ratio is not None:
        drawn_count = torch.zeros_like(natoms).index_add_(0, batch, drawn.to(natoms.dtype))
        alone |= drawn_count > max_ratio * natoms
    moved &= ~alone[batch]
    moved_count = moved_count.masked_fill(alone, 0)

    per_structure = torch.tensor(sigma, dtype=torch.float32).masked_fill(moved_count == 0, 0.0)
    displacement = torch.from_numpy(np.concatenate(noise)) * per_structure[batch, None] * moved[:, None]
    whole = moved_count == natoms
    mean = torch.zeros(len(counts), 3).index_add_(0, batch, displacement) / natoms.clamp(min=1)[:, None]
    displacement -= (mean * whole[:, None])[batch]
    return Corruption(displacement, moved, per_structure, batch)
