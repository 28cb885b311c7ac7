"""DimeNet++ (`dimenetplusplus_backbone`), whose forces are always the energy's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from fairchem.core.models.dimenet_plus_plus import (
    DimeNetPlusPlusWrapBackbone,
    DimeNetPlusPlusWrapEnergyAndForceHead,
)
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.edge_vector import EdgeVectorHead
from fairchem_scd.denoising.hooks import changed_inputs, changed_output, hooked, replaced
from fairchem_scd.fairchem1.backbones.base import Fairchem1Adapter


@register_adapter
class DimeNetPlusPlusAdapter(Fairchem1Adapter):
    """Edges have features, atoms have none. An atom's are the sum of those of the edges that point to it."""

    host_class = DimeNetPlusPlusWrapBackbone
    names = ("dimenetplusplus_backbone",)
    vectors_need_forces = False
    elements_key = None

    @property
    def max_num_elements(self) -> int:
        return self.backbone.emb.emb.num_embeddings

    def vector_head(self) -> nn.Module:
        return EdgeVectorHead(self.scalar_channels)

    @property
    def conservative(self) -> bool:
        return self.backbone.regress_forces

    @contextmanager
    def skip_energy_readout(self) -> Iterator[None]:
        def no_output(x: Tensor, rbf: Tensor, i: Tensor, num_nodes: int) -> Tensor:
            return x.new_zeros(num_nodes, 1)

        no_outputs = [no_output] * len(self.backbone.output_blocks)
        with super().skip_energy_readout(), replaced(self.backbone, "output_blocks", no_outputs):
            yield

    def readout(self) -> Iterable[nn.Module]:
        return (self.backbone.output_blocks,)

    def scalar_layers(self, head: nn.Module) -> Sequence[nn.Module]:
        known = isinstance(head, DimeNetPlusPlusWrapEnergyAndForceHead)
        return [block.lin for block in self.backbone.output_blocks] if known else []

    @property
    def scalar_channels(self) -> int:
        return self.backbone.emb.emb.embedding_dim

    def scalars(self, embedding: Any) -> Tensor:
        edges = embedding["edge_embedding"]
        return edges.new_zeros(len(embedding["P"]), edges.shape[1]).index_add(0, embedding["edge_idx"], edges)

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.emb.emb,)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.backbone.interaction_blocks

    @contextmanager
    def modulated(self, block: nn.Module, index: int, modulation: BoundModulation) -> Iterator[None]:
        # The block's input also goes to its skip connection, which is not to be modulated. So the input is changed only
        # for the two layers that begin the message part.
        features: list[Tensor] = []

        def enter(x: Tensor, *rest: Any) -> tuple[Any, ...]:
            features[:] = [modulation.scalars(index, x)]
            return (x, *rest)

        def read(x: Tensor) -> tuple[Tensor]:
            return (features[0],)

        with (
            changed_inputs(block, enter),
            changed_inputs(block.lin_ji, read),
            changed_inputs(block.lin_kj, read),
            # The update is this layer's output after an activation. That module serves in many places of the block, so
            # this is the nearest place where the update alone can be scaled.
            changed_output(block.lin, lambda update: modulation.update(index, update)),
        ):
            yield

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(hooked(self.backbone.register_forward_hook(_add_directions)))
            if modulation is not None:
                modulation = _ModulationOfEdges(modulation)
                stack.enter_context(changed_inputs(self.backbone.emb, modulation.begin))
            stack.enter_context(super().in_pass(modulation, heads))
            yield


class _ModulationOfEdges:
    """The modulation of edges in a pass. An edge has the condition of its target atom, which is that of its structure.

    Args:
        modulation: of atoms.
    """

    def __init__(self, modulation: BoundModulation) -> None:
        self._of_atoms = modulation
        self._of_edges: BoundModulation | None = None

    def begin(self, elements: Tensor, rbf: Tensor, targets: Tensor, sources: Tensor) -> tuple[Tensor, ...]:
        """Is called with the inputs of the embedding layer, the first that gets the edges of the pass; returns them."""
        self._of_edges = self._of_atoms.of(targets)
        return elements, rbf, targets, sources

    def scalars(self, block: int, scalars: Tensor) -> Tensor:
        return self._of_edges.scalars(block, scalars)

    def update(self, block: int, update: Tensor) -> Tensor:
        return self._of_edges.update(block, update)


def _add_directions(backbone: nn.Module, args: tuple[Any, ...], embedding: dict[str, Any]) -> None:
    """Add the directions of the edges to what the backbone returned, for the EdgeVectorHead."""
    embedding["edge_vec"] = _directions(args[0], backbone.use_pbc)


@torch.no_grad()
def _directions(data: Any, use_pbc: bool) -> Tensor:
    """[E, 3] unit vectors from source to target of the edges that the backbone has written into a batch."""
    source, target = data.edge_index
    vectors = data.pos[target] - data.pos[source]
    if use_pbc:
        vectors -= torch.einsum("ei,eij->ej", data.cell_offsets.to(vectors), data.cell[data.batch[source]])
    return vectors / vectors.norm(dim=-1, keepdim=True)
