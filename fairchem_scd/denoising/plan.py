"""What a denoising step asks of the model, as plain data: passes over views of the batch, and what they train."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

NOISE = "denoising_noise"
"""Key of the predicted noise, [N, 3] in units of the objective's `scale`, among the model's outputs."""

EMBEDDING = "denoising_embedding"
"""Key of the embeddings of structures, [B, C], among the outputs of a plan that returns them."""

VALIDATION = -1
"""The step number of validation. No training step has it: validation has noise of its own, the same in every epoch."""


@dataclass(frozen=True)
class AtomSubset:
    """Some of a batch's atoms, as a batch of its own: n atoms, in the b structures that have at least one of them.

    Attributes:
        atoms: [n] row numbers in the whole batch.
        structures: [b] their structures' numbers in the whole batch.
        natoms: [b] atoms of each.
        batch: [n] the structure of each atom, as a number among the b.
    """

    atoms: Tensor
    structures: Tensor
    natoms: Tensor
    batch: Tensor

    @classmethod
    def of(cls, natoms: Tensor, chosen: Tensor) -> AtomSubset:
        """The subset of the `chosen` [N] (bool) atoms of structures with `natoms` [B] atoms."""
        batch = torch.repeat_interleave(torch.arange(len(natoms)), natoms)
        structures, index, counts = batch[chosen].unique_consecutive(return_inverse=True, return_counts=True)
        return cls(chosen.nonzero()[:, 0], structures, counts, index)


@dataclass(frozen=True)
class Pass:
    """One run of the model over one view of the batch.

    Attributes:
        pos: [N, 3] positions of this view, Å.
        subset: the atoms that this view has, as a graph of its own; None: all atoms. A pass that runs the user's heads
            has all atoms.
        encoding: arguments of the task's `encoding` module. Its result is added to the node embedding before the first
            block; None: nothing is added.
        conditioned: [B] bool, the structures that are conditioned on an embedding. None: the pass has no condition.
        given: [B, C] the embedding that each of them is conditioned on; None: the one that the latest pass with `embed`
            made of it.
        outputs: run the user's own heads.
        embed: make the embedding of each structure that later passes can be conditioned on.
        noise: run the noise head.
        detach_embedding: no gradient through the embedding into this pass.
        recompute: keep no activations of this pass. Backward, when it comes to the pass, runs it once more, and by then
            has freed those of the passes after it.
    """

    pos: Tensor
    subset: AtomSubset | None = None
    encoding: tuple[Tensor, ...] | None = None
    conditioned: Tensor | None = None
    given: Tensor | None = None
    outputs: bool = True
    embed: bool = False
    noise: bool = False
    detach_embedding: bool = False
    recompute: bool = False

    def to(self, device: torch.device) -> Pass:
        """The same pass on another device."""
        return _moved(self, device)


@dataclass(frozen=True)
class Plan:
    """What one call of the model does in a denoising step.

    Attributes:
        task: whose passes they are.
        passes: in order.
        returns_embedding: return what the latest pass with `embed` made, too.
    """

    task: str
    passes: tuple[Pass, ...]
    returns_embedding: bool = False

    def to(self, device: torch.device) -> Plan:
        """The same plan on another device."""
        return _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, tuple or dataclass with all its tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if is_dataclass(value):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


@dataclass(frozen=True)
class Objective:
    """What a denoising step trains.

    Attributes:
        coefficient: weight of the denoising term.
        scale: the unit of the noise target, Å; None: the value of the task's running scale.
        loss: name of the host's loss function for the noise, which is then a term of its own beside the ordinary loss.
            None: on corrupted atoms the noise takes the place of the forces, under the config's own force loss.
        outputs: the outputs, besides forces, that train on corrupted structures; None: all of them.
        clean: the outputs come from a pass over the structures as they are, so they train as in an ordinary step.
    """

    coefficient: float
    scale: float | None
    loss: str | None = None
    outputs: frozenset[str] | None = None
    clean: bool = False
