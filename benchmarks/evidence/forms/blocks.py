"""Forms in which the blocks are told in another way. Those that reach into the backbone know PaiNN alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.evidence.forms.parts import blocks_of, head_of, seen_of
from fairchem_scd.denoising.conditions import BoundModulation, Modulation
from fairchem_scd.denoising.conditions.modulation import BlockModulation


def started(model: Any) -> None:
    """The last layer of the modulation begins as PyTorch has it, not with zeros."""
    for block in blocks_of(model):
        block.mlp[-1].reset_parameters()


def faster(model: Any) -> None:
    """Steps of the condition's weights are five times as large: Adam's steps have one size, whatever the weights'."""
    for layer in [*head_of(model).modules(), *model.denoising["scd"]["modulation"].modules()]:
        if isinstance(layer, nn.Linear):
            for name in ("weight", "bias"):
                parametrize.register_parametrization(layer, name, _Times(5.0))


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, value: Tensor) -> Tensor:
        return value * self.factor

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / self.factor


def condition_alone(model: Any) -> None:
    """Shift, scale and gate are functions of the condition alone, not of the atom's features too."""
    for block in blocks_of(model):
        block.mlp.insert(0, _WithoutFeatures())


class _WithoutFeatures(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        condition, seen = inputs.chunk(2, dim=1)
        return torch.cat([condition, torch.zeros_like(seen)], dim=1)


def into_the_input(model: Any) -> None:
    """A linear function of the condition, zero at first, is added to the atoms' features before the first block too."""
    modulation = model.denoising["scd"]["modulation"]
    channels = head_of(model).norm.normalized_shape[0]
    modulation.__class__, modulation.added = _IntoTheInput, nn.Linear(channels, channels, bias=False)
    nn.init.zeros_(modulation.added.weight)
    modulation.of_pass = None

    def add(_: nn.Module, inputs: Any, features: Tensor) -> Tensor:
        addition, modulation.of_pass = modulation.of_pass, None
        return features if addition is None else features + addition

    model.backbone.atom_emb.register_forward_hook(add)


class _IntoTheInput(Modulation):
    def bind(self, condition: Tensor, conditioned: Tensor) -> BoundModulation:
        self.of_pass = torch.where(conditioned[:, None], self.added(condition), 0.0)
        return super().bind(condition, conditioned)


def vector_gates(model: Any) -> None:
    """The update of the vector features is gated too, by a layer of its own that begins at zero."""
    for block, message in zip(blocks_of(model), model.backbone.message_layers, strict=True):
        channels = message.hidden_channels
        block.__class__, block.vectors, block.of_pass = _GatesVectors, nn.Linear(2 * channels, channels), None
        nn.init.zeros_(block.vectors.weight)
        nn.init.zeros_(block.vectors.bias)
        message.register_forward_hook(_gated(block))


class _GatesVectors(BlockModulation):
    def forward(self, scalars: Tensor, condition: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.tanh(self.vectors(torch.cat([condition, seen_of(scalars)], dim=1)))
        self.of_pass = torch.where(conditioned[:, None], 1 + gate, 1.0)
        return super().forward(scalars, condition, conditioned)


def _gated(block: nn.Module) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: Any, update: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        gate, block.of_pass = block.of_pass, None
        scalars, vectors = update
        return update if gate is None else (scalars, vectors * gate[:, None, :])

    return hook


def update_layers(model: Any) -> None:
    """Beside the message layers the update layers are modulated too, PaiNN's feed-forward part, each by its own MLP."""
    for block, update in zip(blocks_of(model), model.backbone.update_layers, strict=True):
        channels = update.hidden_channels
        block.__class__, block.second = _TellsSecond, BlockModulation(channels, null="identity")
        block.of_pass = block.gate = None
        update.register_forward_pre_hook(_modulated_inputs(block))
        update.register_forward_hook(_modulated_update(block))


class _TellsSecond(BlockModulation):
    def forward(self, scalars: Tensor, condition: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        self.of_pass = condition, conditioned
        return super().forward(scalars, condition, conditioned)


def _modulated_inputs(block: nn.Module) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        told, block.of_pass = block.of_pass, None
        if told is None:
            return inputs
        scalars, block.gate = block.second(inputs[0], *told)
        return scalars, inputs[1]

    return hook


def _modulated_update(block: nn.Module) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: Any, update: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        gate, block.gate = block.gate, None
        return update if gate is None else (update[0] * gate, update[1])

    return hook
