"""Other forms of SCD's condition, which `benchmarks.evidence.condition` compares with the package's.

Each function changes a `DenoisingHydra` in place, before it is trained, and adds no weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fairchem_scd.denoising.conditions.self_condition import ConditionHead


def standardised(model: Any) -> None:
    """The condition is c with each component's running mean and variance taken out, instead of c's LayerNorm."""
    head = _head(model)
    head.norm = nn.BatchNorm1d(head.norm.normalized_shape[0], affine=False)


def moments(model: Any) -> None:
    """Half of the channels are pooled by their root mean square over the atoms, the others by their sum, as usual."""
    _head(model).__class__ = _Moments


def started(model: Any) -> None:
    """The last layer of the modulation begins as PyTorch has it, not with zeros."""
    for block in model.denoising["scd"]["modulation"].blocks:
        block.mlp[-1].reset_parameters()


def _head(model: Any) -> ConditionHead:
    return model.denoising["scd"]["condition_head"]


class _Moments(ConditionHead):
    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        atoms = self.atoms(scalars).float()
        half = atoms.shape[1] // 2
        values = torch.cat([atoms[:, :half], atoms[:, half:].square()], dim=1)
        pooled = atoms.new_zeros(size, atoms.shape[1]).index_add_(0, batch, values)
        count = torch.bincount(batch, minlength=size).clamp(min=1)[:, None]
        root = (pooled[:, half:] / count + 1e-6).sqrt()
        return self.structure(torch.cat([pooled[:, :half], root], dim=1)).float()
