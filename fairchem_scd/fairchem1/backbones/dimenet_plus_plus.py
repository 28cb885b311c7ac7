"""DimeNet++ (`dimenetplusplus_backbone`), whose forces are always the energy's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from fairchem.core.models.dimenet_plus_plus import DimeNetPlusPlusWrapBackbone
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import Adapter, register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.edge_vector import EdgeVectorHead
from fairchem_scd.denoising.hooks import hooked, replaced


@register_adapter
class DimeNetPlusPlusAdapter(Adapter):
    host_class = DimeNetPlusPlusWrapBackbone
    names = ("dimenetplusplus_backbone",)
    legacy_heads = {"dimenetplusplus": {"energy": {"module": "dimenetplusplus_energy_and_force_head"}}}
    moved = {}
    vectors_need_forces = False
    elements_key = None

    def vector_head(self) -> nn.Module:
        return EdgeVectorHead(self.scalar_channels)

    @property
    def max_num_elements(self) -> int:
        return self.backbone.emb.emb.num_embeddings

    @property
    def conservative(self) -> bool:
        return self.backbone.regress_forces

    def readout(self) -> Iterable[nn.Module]:
        return (self.backbone.output_blocks,)

    @contextmanager
    def skip_energy_readout(self) -> Iterator[None]:
        def nothing(x: Tensor, rbf: Tensor, i: Tensor, num_nodes: int) -> Tensor:
            return x.new_zeros(num_nodes, 1)

        with (
            super().skip_energy_readout(),
            replaced(self.backbone, "output_blocks", [nothing] * (self.num_modulated + 1)),
        ):
            yield

    @property
    def scalar_channels(self) -> int:
        return self.backbone.emb.emb.embedding_dim

    @property
    def num_modulated(self) -> int:
        return len(self.backbone.interaction_blocks)

    def scalars(self, embedding: Any) -> Tensor:
        """Atoms have no features but the sum of their edges'."""
        edges = embedding["edge_embedding"]
        return edges.new_zeros(len(embedding["P"]), edges.shape[1]).index_add(0, embedding["edge_idx"], edges)

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.emb.emb,)

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        backbone = self.backbone
        of_edges: list[BoundModulation] = []

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            of_edges[:] = [modulation.of(args[2])]  # elements, radial basis, targets, sources

        def directions(module: nn.Module, args: tuple[Any, ...], embedding: dict[str, Any]) -> None:
            embedding["edge_vec"] = _directions(args[0], backbone.use_pbc)

        with ExitStack() as stack:
            stack.enter_context(hooked(backbone.register_forward_hook(directions)))
            if modulation is not None:
                stack.enter_context(hooked(backbone.emb.register_forward_pre_hook(begin)))
                for i, block in enumerate(backbone.interaction_blocks):
                    stack.enter_context(_modulated(block, of_edges, i))
            yield


@torch.no_grad()
def _directions(data: Any, use_pbc: bool) -> Tensor:
    """[E, 3] unit vectors from source to target of the edges that the backbone noted on a batch."""
    source, target = data.edge_index
    vectors = data.pos[target] - data.pos[source]
    if use_pbc:
        vectors -= torch.einsum("ei,eij->ej", data.cell_offsets.to(vectors), data.cell[data.batch[source]])
    return vectors / vectors.norm(dim=-1, keepdim=True)


@contextmanager
def _modulated(block: nn.Module, of_edges: list[BoundModulation], index: int) -> Iterator[None]:
    """While entered, modulate what the message layers of a block read of the edges, and its update of them.

    Edges have features and atoms none; the condition of an edge is that of its structure.
    """
    read: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        read[:] = [of_edges[0].scalars(index, args[0])]  # args[0] itself goes on to the skip connection

    def reads(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (read[0],)

    def leave(module: nn.Module, args: tuple[Any, ...], made: Tensor) -> Tensor:
        # The update is this layer's output after an activation that the block calls from many places: the nearest
        # that can be scaled without touching anything else.
        return of_edges[0].update(index, made)

    with hooked(
        block.register_forward_pre_hook(enter),
        block.lin_ji.register_forward_pre_hook(reads),
        block.lin_kj.register_forward_pre_hook(reads),
        block.lin.register_forward_hook(leave),
    ):
        yield
