"""What adapters of eSEN's family share, on either host: atoms have spherical-harmonic coefficients in one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.hooks import changed_inputs, changed_output, with_scalars


class CoefficientsAdapter:
    """For adapters of backbones with coefficients [N, (lmax + 1)², C], whose row 0 is l = 0: eSEN and eSCN-MD.

    Each block normalises by its `norm_1` and updates by its `edge_wise`. It comes before `Adapter` among the bases.
    """

    backbone: Any

    @property
    def scalar_channels(self) -> int:
        return self.backbone.sphere_channels

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"][:, 0]

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.sphere_embedding,)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.backbone.blocks

    @contextmanager
    def modulated(self, block: nn.Module, index: int, modulation: BoundModulation) -> Iterator[None]:
        def enter(normed: Tensor) -> Tensor:
            return with_scalars(normed, [0], partial(modulation.scalars, index))

        def leave(update: Tensor) -> Tensor:
            return with_scalars(update, [0], partial(modulation.update, index))

        # eSCN-MD's activation checkpointing is inside edge_wise, so neither hook is needed again in backward.
        with changed_output(block.norm_1, enter), changed_output(block.edge_wise, leave):
            yield

    @property
    def encoding_spec(self) -> dict[str, Any]:
        return {"lmax_list": [self.backbone.lmax], "channels": self.backbone.sphere_channels, "bound": 1.0}

    def encoded(self, encoding: Tensor) -> AbstractContextManager[None]:
        # The edge-degree embedding gets the atoms' first features and adds to them. Activation checkpointing does not
        # run it again.
        return changed_inputs(self.backbone.edge_degree_embedding, lambda x, *rest: (x + encoding, *rest))
