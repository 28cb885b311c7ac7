"""PaiNN (`painn_backbone`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from fairchem.core.models.painn.painn import PaiNNBackbone, PaiNNEnergyHead, PaiNNForceHead
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.hooks import changed_inputs, changed_output
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones.base import Fairchem1Adapter


@register_adapter
class PaiNNAdapter(Fairchem1Adapter):
    """Atoms have scalars [N, C] and vectors [N, 3, C]. An encoding of forces has rows for both."""

    host_class = PaiNNBackbone
    names = ("painn_backbone",)
    vectors_need_forces = runs_lone_structures = False
    elements_key = "num_elements"
    scalar_heads = {PaiNNEnergyHead: "out_energy.2"}
    legacy_outputs = ("out_energy", "out_forces")

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        super().check(config)
        if config.get("direct_forces", True) is False:
            raise ConfigError(
                "model.backbone.direct_forces is false: what the host's painn_force_head returns then is the gradient "
                "of the sum of all atom features, not of the energy; set it to true"
            )

    @property
    def max_num_elements(self) -> int:
        return self.backbone.atom_emb.embeddings.num_embeddings + 1  # the table begins with hydrogen

    def vector_head(self) -> nn.Module:
        # The head takes the output layer out of the backbone that it is given. Here it is given an object with only the
        # attributes that it reads.
        return PaiNNForceHead(SimpleNamespace(direct_forces=True, hidden_channels=self.backbone.hidden_channels))

    @property
    def scalar_channels(self) -> int:
        return self.backbone.hidden_channels

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"]

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.atom_emb,)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.backbone.message_layers

    @contextmanager
    def modulated(self, block: nn.Module, index: int, modulation: BoundModulation) -> Iterator[None]:
        def leave(update: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            scalars, vectors = update
            return modulation.update(index, scalars), vectors

        with (
            changed_output(block.x_layernorm, lambda normed: modulation.scalars(index, normed)),
            changed_output(block, leave),
        ):
            yield

    @property
    def encoding_spec(self) -> dict[str, Any]:
        return {"lmax_list": [1], "channels": self.backbone.hidden_channels, "bound": 1.0}

    @contextmanager
    def encoded(self, encoding: Tensor) -> Iterator[None]:
        scalars, vectors = encoding[:, 0], encoding[:, 1:]  # l = 1 in the order x, y, z
        first = self.backbone.message_layers[0]
        with (
            changed_output(self.backbone.atom_emb, lambda x: x + scalars),
            # The host's forward begins with vectors of zero, to which nothing can be added. They are therefore added
            # twice: to what the first block reads, and to its update, which the host adds to those of zero.
            changed_inputs(first, lambda x, vec, *rest: (x, vec + vectors, *rest)),
            changed_output(first, lambda update: (update[0], update[1] + vectors)),
        ):
            yield
