"""The self-condition of SCD: the model's own embedding of a structure, made into a condition for its blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class ConditionHead(nn.Module):
    """Pool a structure's l = 0 features into an embedding c, and make c the condition that blocks are told.

    c = MLP(pool_i(MLP(x_i))), steps 2 and 3 of SCD (arXiv 2603.17196). Statistics are float32 whatever the autocast.

    Args:
        channels: number C of l = 0 features.
        pool: "sum" or "mean" over the atoms of a structure.
        clamp: bound on the elements of the condition.
        mask_token: learn a token that stands for the embedding where there is none.
    """

    def __init__(
        self,
        channels: int,
        *,
        pool: Literal["sum", "mean"] = "sum",
        clamp: float = 1000.0,
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        self.pool, self.clamp = pool, clamp
        self.atoms = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(), nn.LayerNorm(channels)
        )
        self.structure = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, channels),
            nn.SiLU(),
            nn.LayerNorm(channels),
            nn.Linear(channels, channels),
        )
        self.norm = nn.LayerNorm(channels)
        self.mask_token = nn.Parameter(torch.randn(channels)) if mask_token else None

    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        """Embed.

        Args:
            scalars: [n, C] l = 0 features of atoms.
            batch: [n] the structure of each.
            size: number B of structures.

        Returns:
            [B, C] float32.
        """
        atoms = self.atoms(scalars).float()
        pooled = atoms.new_zeros(size, atoms.shape[1]).index_add_(0, batch, atoms)
        if self.pool == "mean":
            count = atoms.new_zeros(size).index_add_(0, batch, atoms.new_ones(len(batch)))
            pooled = pooled / count.clamp(min=1)[:, None]
        return self.structure(pooled).float()

    def condition(self, embedding: Tensor, conditioned: Tensor) -> Tensor:
        """What blocks are told of each structure.

        Args:
            embedding: [B, C] from `forward`.
            told: [B] bool; the others get the mask token, or what blocks are to ignore.

        Returns:
            [B, C] float32.
        """
        if self.mask_token is not None:
            embedding = torch.where(conditioned[:, None], embedding, self.mask_token)
        return self.norm(embedding.float()).float().clamp(-self.clamp, self.clamp)
