"""Conditional normalisation: a condition shifts, scales and gates the l = 0 features of each block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


class Modulation(nn.Module):
    """Tells the blocks of a backbone a condition, step 4 of SCD (arXiv 2603.17196). One BlockModulation per block.

    Args:
        channels: number C of l = 0 features.
        blocks: number of blocks.
        null: what happens without a condition, see BlockModulation.
        gate_bound: see BlockModulation.
    """

    def __init__(
        self,
        channels: int,
        blocks: int,
        *,
        null: Literal["identity", "mask_token"] = "identity",
        gate_bound: float = 1.0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BlockModulation(channels, null=null, gate_bound=gate_bound) for _ in range(blocks))

    def bind(self, condition: Tensor, conditioned: Tensor) -> BoundModulation:
        """The modulation under one pass's condition.

        Args:
            condition: [n, C] of each atom.
            conditioned: [n] bool, the atoms that have one.
        """
        return BoundModulation(self.blocks, condition, conditioned)


class BoundModulation:
    """A modulation under one pass's condition.

    A block calls `scalars` once on its way in, and then `update` once on its way out: `scalars` computes the factor
    that `update` takes.
    """

    def __init__(self, blocks: nn.ModuleList, condition: Tensor, conditioned: Tensor) -> None:
        self._blocks, self._condition, self._conditioned = blocks, condition, conditioned
        self._gates: dict[int, Tensor] = {}

    def scalars(self, block: int, scalars: Tensor) -> Tensor:
        """Modulate the [n, C] l = 0 features that enter the message part of a block."""
        out, self._gates[block] = self._blocks[block](scalars, self._condition, self._conditioned)
        return out

    def update(self, block: int, update: Tensor) -> Tensor:
        """Scale the [n, C] l = 0 update that the message part returned."""
        return update * self._gates.pop(block).to(update.dtype)

    def of(self, rows: Tensor) -> BoundModulation:
        """The modulation of [m] other rows, such as of edges by the numbers of their atoms."""
        return BoundModulation(self._blocks, self._condition[rows], self._conditioned[rows])


class BlockModulation(nn.Module):
    """Shift, scale and gate of one block, of the condition c and the l = 0 features x̂ after the host's pre-norm.

    shift, scale, gate = MLP([c, sg(x̂)]); x̂ is normalised for the MLP alone, since not every backbone has a pre-norm.

    Args:
        channels: number C of l = 0 features.
        null: "identity": x̂·(1 + scale) + shift, and the update times 1 + b·tanh(α·gate), where shift, scale and gate
            are zero without a condition and at the start. "mask_token", the authors' form: shift plus
            tanh(a·x̂)·(1 + scale)/a, and the update times tanh(α·gate); it has no identity, and every atom has a
            condition.
        gate_bound: b.
    """

    def __init__(self, channels: int, *, null: Literal["identity", "mask_token"], gate_bound: float = 1.0) -> None:
        super().__init__()
        self.gate_bound = gate_bound
        self.mlp = nn.Sequential(
            nn.Linear(2 * channels, channels),
            nn.SiLU(),
            nn.LayerNorm(channels),
            nn.Linear(channels, 3 * channels),
        )
        self.alpha = nn.Parameter(torch.tensor(0.2))
        self.a = nn.Parameter(torch.tensor(0.2)) if null == "mask_token" else None
        if null == "identity":
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, scalars: Tensor, condition: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the modulated features and the factor of the update, both [n, C]."""
        seen = functional.layer_norm(scalars.detach().float(), scalars.shape[-1:])
        shift, scale, gate = self.mlp(torch.cat([condition, seen], dim=-1)).chunk(3, dim=-1)
        if self.a is not None:
            # The same for a and -a. The limit for a → 0 exists, but 0 / 0 does not (the authors clamp at 1e-5, too).
            a = self.a.abs().clamp(min=1e-5)
            squashed = torch.tanh(a * scalars) * (1 + scale) / a
            return (squashed + shift).to(scalars.dtype), torch.tanh(self.alpha * gate)
        # `where`, not a product: an atom without a condition keeps its features bit for bit, whatever the MLP returns.
        conditioned = conditioned[:, None]
        out = torch.where(conditioned, (scalars * (1 + scale) + shift).to(scalars.dtype), scalars)
        factor = torch.where(conditioned, 1 + self.gate_bound * torch.tanh(self.alpha * gate), 1.0)
        return out, factor
