"""GemNet-T (`gemnet_t_backbone`) and GemNet-OC (`gemnet_oc_backbone`), with direct forces or the energy's gradient."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
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

from fairchem_scd.denoising.adapter import Adapter, register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.edge_vector import EdgeVectorHead
from fairchem_scd.denoising.hooks import hooked, replaced
from fairchem_scd.errors import ConfigError


class _GemNetAdapter(Adapter):
    """What both have: atoms' features h, which edges read and which are updated from edges."""

    moved = {}
    vectors_need_forces = runs_lone_structures = False
    elements_key = "num_elements"
    energy_head: ClassVar[type[nn.Module]]

    @classmethod
    def check_heads(cls, config: Mapping[str, Any], heads: Mapping[str, Mapping[str, Any]]) -> None:
        # The blocks that direct forces are read from belong to the backbone.
        modules = {registry.get_model_class(head["module"]) for head in heads.values() if "module" in head}
        if config.get("direct_forces", False) and modules == {cls.energy_head}:
            raise ConfigError(
                "model.backbone.direct_forces is true, and no head of model.heads predicts forces: parameters would "
                "have no gradient; set it to false for energies alone, or add the force head"
            )

    def vector_head(self) -> nn.Module:
        return EdgeVectorHead(self.backbone.edge_emb.dense.linear.out_features)

    @property
    def max_num_elements(self) -> int:
        return self.backbone.atom_emb.embeddings.num_embeddings + 1  # its table begins with hydrogen

    @property
    def scalar_channels(self) -> int:
        return self.backbone.atom_emb.emb_size

    @property
    def num_modulated(self) -> int:
        return len(self.backbone.int_blocks)

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"]

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.atom_emb,)

    def readout(self) -> Iterable[nn.Module]:
        return (self.backbone.out_blocks, self.backbone.mlp_rbf_out)

    @contextmanager
    def skip_energy_readout(self) -> Iterator[None]:
        # Nobody reads these, and they have layers on edges: some tenth of a pass.
        nothing = [lambda *_: (0, 0)] * len(self.backbone.out_blocks)
        with super().skip_energy_readout(), replaced(self.backbone, "out_blocks", nothing):
            yield

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        blocks = self.backbone.int_blocks
        # Atoms tell edges their features at the end of a block, for the next one.
        readers = [self.backbone.edge_emb, *(block.concat_layer for block in blocks[:-1])]
        with ExitStack() as stack:
            if modulation is not None:
                for i, (reader, block) in enumerate(zip(readers, blocks, strict=True)):
                    stack.enter_context(_modulated(reader, block.atom_update, modulation, i))
            yield


@register_adapter
class GemNetTAdapter(_GemNetAdapter):
    host_class, energy_head = GemNetTBackbone, GemNetTEnergyAndGradForceHead
    names = ("gemnet_t_backbone",)
    legacy_heads = {"gemnet_t": {"energy": {"module": "gemnet_t_energy_and_grad_force_head"}}}

    @classmethod
    def hydra_heads(cls, name: str, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        heads = super().hydra_heads(name, arguments)
        if arguments.get("direct_forces", False):
            heads["forces"] = {"module": "gemnet_t_force_head"}
        return heads

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        # Diatomic parts have no triplets, which the host cannot sum: one of zeros, through which all has a gradient.
        def one_at_least(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            (radial, angular), edges, _, place = args
            if len(edges):
                return None
            first = place.new_zeros(1)
            zeros = angular.new_zeros(*angular.shape[:2], 1)
            return (radial, zeros), edges.sum(dim=0, keepdim=True), first, first

        layers = [block.trip_interaction.mlp_cbf for block in self.backbone.int_blocks]
        hooks = [layer.register_forward_pre_hook(one_at_least) for layer in layers]
        with hooked(*hooks), super().in_pass(modulation, heads):
            yield


@register_adapter
class GemNetOCAdapter(_GemNetAdapter):
    host_class, energy_head = GemNetOCBackbone, GemNetOCEnergyAndGradForceHead
    names = ("gemnet_oc_backbone",)
    legacy_heads = {"gemnet_oc": {"energy": {"module": "gemnet_oc_energy_and_grad_force_head"}}}
    moved = {"out_mlp_E": "energy", "out_energy": "energy", "out_mlp_F": "forces", "out_forces": "forces"}

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        super().check(config)
        gradient = config.get("regress_forces", True) and not config.get("direct_forces", False)
        if gradient and config.get("quad_interaction"):
            logging.warning(
                "model.backbone.quad_interaction with direct_forces: false: the host's derivatives are not finite "
                "where four atoms lie on a line, as in crystals and slabs; set it to false there"
            )

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        # Left from the one-piece model. The host's heads take theirs out; without them they have no gradient.
        for name in self.moved:
            if hasattr(backbone, name):
                setattr(backbone, name, None)

    @classmethod
    def hydra_heads(cls, name: str, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        heads = super().hydra_heads(name, arguments)
        if arguments.get("direct_forces", False):
            heads["forces"] = {"module": "gemnet_oc_force_head"}
        for head in heads.values():
            head["num_global_out_layers"] = arguments.get("num_global_out_layers", 2)
            if "output_init" in arguments:
                head["output_init"] = arguments["output_init"]
        return heads

    def vector_head(self) -> nn.Module:
        if self.backbone.direct_forces:
            return GemNetOCForceHead(self.backbone, num_global_out_layers=2)
        return super().vector_head()

    def readout(self) -> Iterable[nn.Module]:
        if not self.backbone.direct_forces:
            return super().readout()
        # The vector head reads the others.
        parts = [(block.dense_rbf, block.seq_energy_pre, block.seq_energy2) for block in self.backbone.out_blocks]
        return [part for block in parts for part in block if part is not None]

    @contextmanager
    def skip_energy_readout(self) -> Iterator[None]:
        if self.backbone.direct_forces:
            yield
            return
        with super().skip_energy_readout():
            yield

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        # The host's backbone keeps to itself what it returns in GemNet-T.
        last: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> None:
            last[:] = out

        def add(module: nn.Module, args: tuple[Any, ...], embedding: dict[str, Any]) -> None:
            embedding["node_embedding"], embedding["edge_embedding"] = last

        backbone = self.backbone
        hooks = backbone.int_blocks[-1].register_forward_hook(note), backbone.register_forward_hook(add)
        with hooked(*hooks), super().in_pass(modulation, heads):
            yield


@contextmanager
def _modulated(reader: nn.Module, update: nn.Module, modulation: BoundModulation, index: int) -> Iterator[None]:
    """While entered, modulate what a layer on edges reads of atoms, and the update that the next block makes of edges.

    Nothing else reads what is modulated here: the residual stream of atoms' features stays as it is.
    """

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (modulation.scalars(index, args[0]), *args[1:])

    def leave(module: nn.Module, args: tuple[Any, ...], made: Tensor) -> Tensor:
        return modulation.update(index, made)

    with hooked(reader.register_forward_pre_hook(enter), update.register_forward_hook(leave)):
        yield
