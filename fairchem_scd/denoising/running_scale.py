"""The unit of a noise target that is not known beforehand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RunningScale(nn.Module):
    """Root mean square of all noise so far. One scalar: a statistic per component would break equivariance.

    It is kept in buffers, so it is saved and restored with the weights; float32 whatever the autocast.

    Args:
        initial: its value before any noise was seen, Å.
    """

    mean_square: Tensor
    count: Tensor

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.register_buffer("mean_square", torch.tensor(initial**2, dtype=torch.float32))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))

    @property
    def scale(self) -> Tensor:
        """Å, a scalar on the buffers' device."""
        return self.mean_square.sqrt()

    @torch.no_grad()
    def update(self, noise: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Add a batch's noise to the statistics, without waiting for the device.

        Args:
            noise: [n, 3] of the atoms that moved on this rank, Å.
            total: sum of a tensor over the ranks; every rank calls it once.
        """
        # In double precision: the result must not depend on how the atoms are spread over ranks.
        local = torch.stack([noise.double().square().sum(), torch.tensor(float(noise.numel()), dtype=torch.float64)])
        squares, fresh = total(local.to(self.mean_square.device, non_blocking=True))
        self.count += fresh.long()
        step = (squares - fresh * self.mean_square) / self.count.clamp(min=1)
        self.mean_square += step.float()
