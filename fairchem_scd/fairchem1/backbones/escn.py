"""eSCN (`escn_backbone`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from fairchem.core.models.escn.escn import eSCNBackbone, eSCNEnergyHead, eSCNForceHead
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.hooks import changed_inputs, changed_output, with_scalars
from fairchem_scd.fairchem1.backbones.base import Fairchem1Adapter


@register_adapter
class ESCNAdapter(Fairchem1Adapter):
    """Atoms have spherical-harmonic coefficients [N, Σ(lmax + 1)², C] in one or more resolutions.

    Block 0 takes no part in the residual stream: its output replaces its input.
    """

    host_class = eSCNBackbone
    names = ("escn_backbone",)
    scalar_heads = {eSCNEnergyHead: "energy_block.fc3"}
    legacy_outputs = ("energy_block",)

    def vector_head(self) -> nn.Module:
        return eSCNForceHead(self.backbone)

    @property
    def scalar_channels(self) -> int:
        return self.backbone.sphere_channels_all

    def scalars(self, embedding: Any) -> Tensor:
        # Row by row: a list of them would have to be sent to the device.
        return torch.cat([embedding["node_embedding"].embedding[:, row] for row in self._rows], dim=1)

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.sphere_embedding,)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.backbone.layer_blocks[1:]

    @contextmanager
    def modulated(self, block: nn.Module, index: int, modulation: BoundModulation) -> Iterator[None]:
        def enter(x: Any, *rest: Any) -> tuple[Any, ...]:
            read = copy.copy(x)  # x itself is the residual stream
            read.embedding = with_scalars(x.embedding, self._rows, partial(modulation.scalars, index))
            return (read, *rest)

        def leave(update: Any) -> Any:
            update.embedding = with_scalars(update.embedding, self._rows, partial(modulation.update, index))
            return update

        with changed_inputs(block, enter), changed_output(block, leave):
            yield

    @property
    def encoding_spec(self) -> dict[str, Any]:
        backbone = self.backbone
        return {
            "lmax_list": backbone.lmax_list,
            "channels": backbone.sphere_channels,
            "bound": 0.001,
            "weight_decay": False,  # the host's eSCN spares all that is an embedding, as the DeNS authors' does
        }

    def encoded(self, encoding: Tensor) -> AbstractContextManager[None]:
        # What enters block 0 is the atoms' first features, and nothing else reads them.
        def add(x: Any, *rest: Any) -> tuple[Any, ...]:
            x = x.clone()
            x.embedding = x.embedding + encoding
            return (x, *rest)

        return changed_inputs(self.backbone.layer_blocks[0], add)

    @property
    def _rows(self) -> list[int]:
        """The l = 0 row of each resolution."""
        sizes = [(lmax + 1) ** 2 for lmax in self.backbone.lmax_list]
        return [sum(sizes[:i]) for i in range(len(sizes))]
