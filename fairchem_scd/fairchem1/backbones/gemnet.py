"""GemNet-T (`gemnet_t_backbone`) and GemNet-OC (`gemnet_oc_backbone`), with direct forces or the energy's gradient."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from fairchem.core.common.registry import registry
from fairchem.core.models.gemnet.gemnet import GemNetTBackbone, GemNetTEnergyAndGradForceHead
from fairchem.core.models.gemnet_oc.gemnet_oc import (
    GemNetOCBackbone,
    GemNetOCEnergyAndGradForceHead,
    GemNetOCForceHead,
)
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.edge_vector import EdgeVectorHead
from fairchem_scd.denoising.hooks import changed_inputs, changed_output, outputs_of, replaced
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones.base import Fairchem1Adapter


class _GemNetAdapter(Fairchem1Adapter):
    """What both have in common: features h of atoms, which edges read, and which edges update.

    Class attributes:
        energy_head: the host's head for the energy, and for forces where they are its gradient.
    """

    vectors_need_forces = runs_lone_structures = False
    elements_key = "num_elements"
    energy_head: ClassVar[type[nn.Module]]

    @classmethod
    def check_heads(cls, config: Mapping[str, Any], heads: Mapping[str, Mapping[str, Any]]) -> None:
        # Layers that only direct forces need belong to the backbone.
        modules = {registry.get_model_class(head["module"]) for head in heads.values() if "module" in head}
        if config.get("direct_forces", False) and modules == {cls.energy_head}:
            raise ConfigError(
                "model.backbone.direct_forces is true, and no head of model.heads predicts forces: parameters would "
                "have no gradient; set it to false for energies alone, or add the force head"
            )

    @property
    def max_num_elements(self) -> int:
        return self.backbone.atom_emb.embeddings.num_embeddings + 1  # the table begins with hydrogen

    def vector_head(self) -> nn.Module:
        return EdgeVectorHead(self.backbone.edge_emb.dense.linear.out_features)

    @contextmanager
    def skip_energy_readout(self) -> Iterator[None]:
        # The output blocks have layers on edges, and take about a tenth of a pass.
        no_outputs = [lambda *_: (0, 0)] * len(self.backbone.out_blocks)
        with super().skip_energy_readout(), replaced(self.backbone, "out_blocks", no_outputs):
            yield

    def readout(self) -> Iterable[nn.Module]:
        return (self.backbone.out_blocks, self.backbone.mlp_rbf_out)

    @property
    def scalar_channels(self) -> int:
        return self.backbone.atom_emb.emb_size

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"]

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.atom_emb,)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.backbone.int_blocks

    @contextmanager
    def modulated(self, block: nn.Module, index: int, modulation: BoundModulation) -> Iterator[None]:
        # A block's edges read the atoms' features before the block begins: in the layer that first makes the edges'
        # features, or at the end of the block before.
        reader = self.backbone.edge_emb if index == 0 else self.backbone.int_blocks[index - 1].concat_layer
        with (
            changed_inputs(reader, lambda h, *rest: (modulation.scalars(index, h), *rest)),
            changed_output(block.atom_update, lambda update: modulation.update(index, update)),
        ):
            yield


@register_adapter
class GemNetTAdapter(_GemNetAdapter):
    host_class, energy_head = GemNetTBackbone, GemNetTEnergyAndGradForceHead
    names = ("gemnet_t_backbone",)

    def scalar_layers(self, head: nn.Module) -> Sequence[nn.Module]:
        return [block.out_energy for block in self.backbone.out_blocks] if isinstance(head, self.energy_head) else []

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        # A graph without triplets, as of a part of two atoms, ends in an error of the host's sum over triplets. It gets
        # one triplet whose features are zero, through which every parameter has a gradient.
        def at_least_one(
            basis: tuple[Tensor, Tensor], features: Tensor, edge: Tensor, place: Tensor
        ) -> tuple[Any, ...]:
            if len(features):
                return basis, features, edge, place
            radial, angular = basis
            zeros, first = angular.new_zeros(*angular.shape[:2], 1), place.new_zeros(1)
            return (radial, zeros), features.sum(dim=0, keepdim=True), first, first

        with ExitStack() as stack:
            for block in self.backbone.int_blocks:
                stack.enter_context(changed_inputs(block.trip_interaction.mlp_cbf, at_least_one))
            stack.enter_context(super().in_pass(modulation, heads))
            yield


@register_adapter
class GemNetOCAdapter(_GemNetAdapter):
    host_class, energy_head = GemNetOCBackbone, GemNetOCEnergyAndGradForceHead
    names = ("gemnet_oc_backbone",)
    scalar_heads = {GemNetOCEnergyAndGradForceHead: "out_energy"}
    legacy_outputs = ("out_mlp_E", "out_energy", "out_mlp_F", "out_forces")

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        super().check(config)
        gradient = config.get("regress_forces", True) and not config.get("direct_forces", False)
        if gradient and config.get("quad_interaction"):
            logging.warning(
                "model.backbone.quad_interaction with direct_forces: false: the host's derivatives are not finite "
                "where four atoms lie on a line, as in crystals and slabs; set it to false there"
            )

    def vector_head(self) -> nn.Module:
        if self.backbone.direct_forces:
            return GemNetOCForceHead(self.backbone, num_global_out_layers=2)
        return super().vector_head()

    @contextmanager
    def skip_energy_readout(self) -> Iterator[None]:
        if self.backbone.direct_forces:  # the vector head reads the output blocks
            yield
            return
        with super().skip_energy_readout():
            yield

    def readout(self) -> Iterable[nn.Module]:
        if not self.backbone.direct_forces:
            return super().readout()
        # The layers of the output blocks that belong to the energy. The vector head reads the others.
        layers = [(block.dense_rbf, block.seq_energy_pre, block.seq_energy2) for block in self.backbone.out_blocks]
        return [layer for block in layers for layer in block if layer is not None]

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        # This backbone does not return the last features of atoms and edges, which GemNet-T does return.
        backbone = self.backbone
        with outputs_of(backbone.int_blocks[-1]) as last:

            def add(embedding: dict[str, Any]) -> dict[str, Any]:
                embedding["node_embedding"], embedding["edge_embedding"] = last.pop()
                return embedding

            with changed_output(backbone, add), super().in_pass(modulation, heads):
                yield
