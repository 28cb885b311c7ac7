"""The force condition of DeNS: forces of the original structure, as features of its atoms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from e3nn import o3
from torch import Tensor, nn


class ForceEncoding(nn.Module):
    """Encode forces (and σ) into spherical-harmonic node features, to be added to the node embedding.

    f = Y(F/|F|) · |F| / √3 with real spherical harmonics in 'component' normalisation, then one weight a degree and
    channel (DeNS, arXiv 2403.09549). There is no bias, unlike in the authors' code: an atom without a force
    leaves no trace. With several resolutions each has rows and weights of its own, in the host's order.

    Args:
        lmax_list: highest degree of each resolution of the backbone.
        channels: channels C of one resolution.
        bound: initial weights of the forces are uniform in ±bound, and those of σ in ±1; None: both are normal with
            standard deviation 1.
        forces: encode forces.
        sigma: encode each atom's σ into its l = 0 features.
        weight_decay: the optimiser's weight decay is for these weights too.
    """

    def __init__(
        self,
        lmax_list: Sequence[int],
        channels: int,
        bound: float | None,
        *,
        forces: bool = True,
        sigma: bool = False,
        weight_decay: bool = True,
    ) -> None:
        super().__init__()
        self.weight_decay = weight_decay
        self.lmax = max(lmax_list)
        degree, harmonic, scalars, offset = [], [], [], 0
        for lmax in lmax_list:
            scalars.append(len(harmonic))
            degree += [offset + l for l in range(lmax + 1) for _ in range(2 * l + 1)]
            harmonic += range((lmax + 1) ** 2)
            offset += lmax + 1
        self.register_buffer("degree", torch.tensor(degree), persistent=False)
        self.register_buffer("harmonic", torch.tensor(harmonic), persistent=False)
        self.register_buffer("scalars", torch.tensor(scalars), persistent=False)
        self.force_weight = _initial(offset, channels, bound) if forces else None
        self.sigma_weight = _initial(len(lmax_list), channels, None if bound is None else 1.0) if sigma else None

    def forward(self, forces: Tensor, mask: Tensor, sigma: Tensor) -> Tensor:
        """Encode.

        Args:
            forces: [N, 3] forces of the original structure, eV/Å.
            mask: [N] bool, the atoms whose force is encoded.
            sigma: [N] standard deviation of the noise in each atom's structure, Å; zero where nothing moved.

        Returns:
            [N, Σ(lmax+1)², C]; all zero where `mask` is False and σ is zero.
        """
        # float32 whatever the autocast: Y is a polynomial of high degree.
        with torch.autocast(forces.device.type, enabled=False):
            forces = forces.float()
            if self.force_weight is None:
                encoding = forces.new_zeros(len(forces), len(self.degree), self.sigma_weight.shape[1])
            else:
                degrees = list(range(self.lmax + 1))
                y = o3.spherical_harmonics(degrees, forces, normalize=True, normalization="component")
                y = y * (forces.norm(dim=-1, keepdim=True) / math.sqrt(3.0)) * mask[:, None]
                encoding = y[:, self.harmonic, None] * self.force_weight[self.degree]
            if self.sigma_weight is not None:
                encoding = encoding.index_add(1, self.scalars, sigma.float()[:, None, None] * self.sigma_weight)
            return encoding


def _initial(rows: int, channels: int, bound: float | None) -> nn.Parameter:
    """[rows, channels], uniform in ±bound; None: normal with standard deviation 1."""
    weight = torch.empty(rows, channels)
    return nn.Parameter(weight.normal_() if bound is None else weight.uniform_(-bound, bound))
