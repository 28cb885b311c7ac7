"""Forms of SCD's condition, which the studies compare with the package's.

Each function changes a `DenoisingHydra` in place, before it is trained; `from_large_noise` changes the trainer's task.
Without a condition all of them compute what the host's plain model computes. Those that reach into the backbone know
PaiNN alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from benchmarks.evidence.noise import mean_of_structures, told_differences
from fairchem_scd.denoising.conditions import BoundModulation, ConditionHead, Modulation
from fairchem_scd.denoising.conditions.modulation import BlockModulation
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import EMBEDDING, NOISE, VALIDATION, Plan
from fairchem_scd.fairchem1.hydra import DenoisingHydra

ELEMENTS = 100

# --- what is told -----------------------------------------------------------------------------------------------------


def standardised(model: Any) -> None:
    """The condition is c with each component's mean and variance over the batch taken out, instead of its LayerNorm.

    In validation they are running ones.
    """
    head = _head(model)
    head.norm = nn.BatchNorm1d(head.norm.normalized_shape[0], affine=False)


def running(model: Any) -> None:
    """As `standardised`, by the running statistics in training too, not by those of each batch."""
    head = _head(model)
    head.norm = _Running(head.norm.normalized_shape[0])


class _Running(nn.Module):
    """Takes out a running mean and variance of its inputs [B, C], through which no gradient flows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("moments", torch.zeros(2, channels))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.batches += 1
                fresh = torch.stack([values.mean(dim=0), values.square().mean(dim=0)])
                self.moments.lerp_(fresh, 1 / self.batches.clamp(max=100))
        mean, square = self.moments.clone()
        return (values - mean) / (square - mean.square() + 1e-5).sqrt()


def without_elements(model: Any) -> None:
    """As `running`; and what an atom's features owe to its element is taken out before they are pooled.

    The noisy structure has the same elements, so that they tell nothing of the noise. From each atom's features the
    running mean over atoms of its element is subtracted, and the rest divided by its running root mean square, in place
    of the first LayerNorm.
    """
    running(model)
    head = _head(model)
    head.__class__, head.numbers = _WithoutElements, _numbers_of(model)
    head.atoms[0] = _Centred(head.norm.channels)


class _WithoutElements(ConditionHead):
    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        self.atoms[0].numbers = self.numbers.of_pass
        return super().forward(scalars, batch, size)


class _Centred(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(ELEMENTS + 1, channels))
        self.register_buffer("seen", torch.zeros(ELEMENTS + 1, 1))
        self.scale = _Running(channels)

    def forward(self, features: Tensor) -> Tensor:
        features, numbers = features.float(), self.numbers
        if self.training:
            with torch.no_grad():
                count = torch.bincount(numbers, minlength=len(self.means))[:, None].float()
                fresh = torch.zeros_like(self.means).index_add_(0, numbers, features) / count.clamp(min=1)
                self.seen += count > 0
                self.means.lerp_(fresh, torch.where(count > 0, 1 / self.seen.clamp(1, 100), 0.0))
        return self.scale(features - self.means[numbers].clone())


def moments(model: Any) -> None:
    """Half of the channels are pooled by their root mean square over the atoms, the others by their sum, as usual."""
    _head(model).__class__ = _Moments


class _Moments(ConditionHead):
    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        atoms = self.atoms(scalars).float()
        half = atoms.shape[1] // 2
        values = torch.cat([atoms[:, :half], atoms[:, half:].square()], dim=1)
        pooled = atoms.new_zeros(size, atoms.shape[1]).index_add_(0, batch, values)
        count = torch.bincount(batch, minlength=size).clamp(min=1)[:, None]
        root = (pooled[:, half:] / count + 1e-6).sqrt()
        return self.structure(torch.cat([pooled[:, :half], root], dim=1)).float()


TOKENS = 4


def tokens(model: Any) -> None:
    """Four vectors a structure instead of one, each pooled with attention weights over the atoms of its own.

    In each block an atom reads a mixture of them, whose weights follow from its l = 0 features. Still no vector is an
    atom's own, unless one atom has all the weight.
    """
    head = _head(model)
    channels = head.norm.normalized_shape[0]
    head.__class__, head.scores = _Tokens, nn.Linear(channels, TOKENS)
    for block in _blocks(model):
        block.__class__, block.choice = _ReadsTokens, nn.Linear(channels, TOKENS)


class _Vectors(ConditionHead):
    """An embedding of several vectors a structure, [B, count · C]."""

    count: int

    def condition(self, embedding: Tensor, conditioned: Tensor) -> Tensor:
        return self.norm(embedding.unflatten(1, (self.count, -1))).float().flatten(1)


class _Tokens(_Vectors):
    count = TOKENS

    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        atoms = self.atoms(scalars).float()
        # No score is so large that its exponential is none: a softmax without the usual shift.
        weights = torch.exp(5 * torch.tanh(self.scores(atoms)))
        total = weights.new_zeros(size, TOKENS).index_add(0, batch, weights)
        values = weights[:, :, None] * atoms[:, None, :]
        pooled = values.new_zeros(size, *values.shape[1:]).index_add(0, batch, values) / total[:, :, None].clamp(1e-9)
        return self.structure(pooled).float().flatten(1)


class _ReadsTokens(BlockModulation):
    def forward(self, scalars: Tensor, condition: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.choice(_seen(scalars)).softmax(dim=1)
        read = (weights[:, :, None] * condition.unflatten(1, (TOKENS, -1))).sum(dim=1)
        return super().forward(scalars, read, conditioned)


def by_element(model: Any) -> None:
    """A vector for each element of a structure, pooled over its atoms; an atom is told that of its own element."""
    head, numbers = _head(model), _numbers_of(model)
    head.__class__, head.numbers = _ByElement, numbers
    for block in _blocks(model):
        block.__class__, block.numbers = _ReadsItsElement, numbers


class _ByElement(_Vectors):
    count = ELEMENTS

    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        atoms = self.atoms(scalars).float()
        place = batch * ELEMENTS + self.numbers.of_pass
        pooled = atoms.new_zeros(size * ELEMENTS, atoms.shape[1]).index_add(0, place, atoms)
        return self.structure(pooled).float().view(size, -1)


class _ReadsItsElement(BlockModulation):
    def forward(self, scalars: Tensor, condition: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        atoms = torch.arange(len(scalars), device=scalars.device)
        own = condition.unflatten(1, (ELEMENTS, -1))[atoms, self.numbers.of_pass]
        return super().forward(scalars, own, conditioned)


def dropped_by_atom(model: Any) -> None:
    """In training a tenth of the atoms of structures with a condition go without it, drawn atom by atom."""
    model.denoising["scd"]["modulation"].__class__ = _DroppedByAtom


class _DroppedByAtom(Modulation):
    def bind(self, condition: Tensor, conditioned: Tensor) -> BoundModulation:
        if self.training:
            conditioned = conditioned & (torch.rand(len(conditioned), device=conditioned.device) >= 0.1)
        return super().bind(condition, conditioned)


# --- how blocks are told ----------------------------------------------------------------------------------------------


def started(model: Any) -> None:
    """The last layer of the modulation begins as PyTorch has it, not with zeros."""
    for block in _blocks(model):
        block.mlp[-1].reset_parameters()


def faster(model: Any) -> None:
    """Steps of the condition's weights are five times as large: Adam's steps have one size, whatever the weights'."""
    for layer in [*_head(model).modules(), *model.denoising["scd"]["modulation"].modules()]:
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
    for block in _blocks(model):
        block.mlp.insert(0, _WithoutFeatures())


class _WithoutFeatures(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        condition, seen = inputs.chunk(2, dim=1)
        return torch.cat([condition, torch.zeros_like(seen)], dim=1)


def into_the_input(model: Any) -> None:
    """A linear function of the condition, zero at first, is added to the atoms' features before the first block too."""
    modulation = model.denoising["scd"]["modulation"]
    channels = _head(model).norm.normalized_shape[0]
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
    for block, message in zip(_blocks(model), model.backbone.message_layers, strict=True):
        channels = message.hidden_channels
        block.__class__, block.vectors, block.of_pass = _GatesVectors, nn.Linear(2 * channels, channels), None
        nn.init.zeros_(block.vectors.weight)
        nn.init.zeros_(block.vectors.bias)
        message.register_forward_hook(_gated(block))


class _GatesVectors(BlockModulation):
    def forward(self, scalars: Tensor, condition: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.tanh(self.vectors(torch.cat([condition, _seen(scalars)], dim=1)))
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
    for block, update in zip(_blocks(model), model.backbone.update_layers, strict=True):
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


def together(model: Any) -> None:
    """The forms of this file that gained about a hundredth each: standardised, started, in the input and the updates.

    The gates of vector features are not among them, since two forms cannot have the same blocks.
    """
    for form in (into_the_input, update_layers, started, standardised):
        form(model)


# --- what is trained --------------------------------------------------------------------------------------------------


def contrastive(model: Any) -> None:
    """A third pass is told another structure's embedding, and should do worse than the second by a margin.

    The term is mean over structures of max(0, 0.2 + e_right − e_other), with errors in σ², and the weight of the
    noise's own.
    """
    model.__class__ = _Contrastive


class _Contrastive(DenoisingHydra):
    def forward(self, data: Any, plan: Plan | None = None) -> dict[str, Any]:
        if plan is None or not self.training:
            return super().forward(data, plan)
        out = super().forward(data, replace(plan, returns_embedding=True))
        noisy, task = plan.passes[-1], self.denoising_tasks["scd"]
        asked = replace(noisy, given=out.pop(EMBEDDING).roll(1, 0))
        other = super().forward(data, Plan(plan.task, (asked,)))[NOISE]
        target = (noisy.pos - data.pos) / task.settings.std
        errors = ((noise - target).square() for noise in (out[NOISE], other))
        right, wrong = (mean_of_structures(of, data.batch, len(data.natoms)).mean(dim=1) for of in errors)
        hinge = (0.2 + right - wrong).clamp(min=0)[noisy.conditioned].sum() / len(data.natoms)
        out[NOISE] = _WithTerm.apply(out[NOISE], task.settings.coefficient_of(False) * hinge)
        return out


class _WithTerm(torch.autograd.Function):
    """Returns its first argument as it is, and adds the second to whatever loss is made of it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, term: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


def from_large_noise(task: Any) -> None:
    """σ falls from four times its value to its value, over the first 500 steps of training.

    Args:
        task: the trainer's, which draws the noise.
    """
    drawn = task.corrupt
    first = None

    def corrupt(structures: Any, *, seed: int, step: int) -> Corruption:
        nonlocal first
        found = drawn(structures, seed=seed, step=step)
        if step == VALIDATION:
            return found
        first = step if first is None else first
        factor = math.exp(math.log(4.0) * max(0.0, 1 - (step - first) / 500))
        return replace(found, noise=factor * found.noise, sigma=factor * found.sigma)

    task.corrupt = corrupt


def _numbers_of(model: Any) -> _Numbers:
    numbers = _Numbers()
    model.backbone.register_forward_pre_hook(numbers.note)
    return numbers


class _Numbers:
    """The atomic numbers [n] of the pass that is running."""

    def note(self, _: nn.Module, inputs: tuple[Any]) -> None:
        self.of_pass = inputs[0].atomic_numbers.long()


def _head(model: Any) -> ConditionHead:
    return model.denoising["scd"]["condition_head"]


def _blocks(model: Any) -> nn.ModuleList:
    return model.denoising["scd"]["modulation"].blocks


def _seen(scalars: Tensor) -> Tensor:
    """What a modulation sees of the l = 0 features."""
    return functional.layer_norm(scalars.detach().float(), scalars.shape[-1:])


# --- their names ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A form of SCD's condition.

    Attributes:
        scd: settings of `task.denoising.scd`.
        change: what is done to the model, for forms that the package does not have.
        change_task: what is done to the trainer's task.
    """

    scd: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None
    change_task: Callable[[Any], None] | None = None


LEVERS = {
    "mask token": Form({"null_condition": "mask_token"}),
    "condition never dropped": Form({"condition_drop": 0.0}),
    "condition dropped half of the time": Form({"condition_drop": 0.5}),
    "no gradient through the embedding": Form({"stop_gradient_condition": True}),
    "clean view without noise": Form({"std_reg": 0.0}),
    "clean view with noise of 0.02 Å": Form({"std_reg": 0.02}),
    "standardised": Form(change=standardised),
    "standardised by running statistics": Form(change=running),
    "standardised, without elements": Form(change=without_elements),
    "moments": Form(change=moments),
    "modulation not zero at first": Form(change=started),
    "four vectors, pooled and read by attention": Form(change=tokens),
    "pooled by element": Form(change=by_element),
    "into the input features too": Form(change=into_the_input),
    "into the update layers too": Form(change=update_layers),
    "gates of vector features too": Form(change=vector_gates),
    "shift, scale and gate of the condition alone": Form(change=condition_alone),
    "five times the learning rate": Form(change=faster),
    "dropped by atom": Form({"condition_drop": 0.0}, dropped_by_atom),
    "contrastive term": Form(change=contrastive),
    "σ from large to small": Form(change_task=from_large_noise),
    "five of these together": Form(change=together, change_task=from_large_noise),
}
"""Forms that differ from the package's in one thing; `mask token` is the authors'."""
FORMS = {
    "plain": Form({"condition": []}),
    "difference": Form(change=told_differences),
    "embedding": Form(),
    **LEVERS,
}
"""By name: no condition, `noise.DifferenceHydra`, the package's, and others."""
