"""Does the embedding tell the noisy pass anything? Measured on a data set; the result depends on nothing else.

The noise of each structure is predicted three times: told the structure's own embedding ("right"), another structure's
("other"), and none. That takes one clean pass and three noisy ones, in two sweeps over the data. The first sweep embeds
every structure and tells it the right embedding. Then every structure gets a partner among all of them. The second
sweep tells it the partner's embedding, and none.

**The partner** of a structure follows from the data alone. Structures are put in order by a hash of what they are
(elements, positions, cell). That order has nothing to do with their order in the data, where neighbours are often
alike. Each is told the embedding of the one before it; the first, that of the last. So a partner is never the structure
itself, nor a copy of it. It is the same in every epoch and every run, however the data are divided into batches, which
may hold a single structure, and among ranks. Where all structures are one and the same there is no partner, and nothing
is measured.

A structure counts once, though several ranks or batches may have it: the host's samplers repeat some where the data do
not divide evenly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fairchem_scd.denoising.condition_report import ConditionReport, Errors, Gain, participation_ratio, relative_spread
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.passes import DenoisingModel
from fairchem_scd.denoising.plan import EMBEDDING, NOISE, VALIDATION, Pass, Plan
from fairchem_scd.denoising.ranks import gathered
from fairchem_scd.denoising.structures import Structures, identities, structures_of
from fairchem_scd.denoising.tasks.base import DenoisingTask
from fairchem_scd.errors import ConfigError

Key = tuple[str, str]
"""What a structure is (a hash), and its name, which keys its noise."""

Call = Callable[[Any, Plan], Mapping[str, Tensor]]
"""Calls the model with a batch and a plan, in eval mode and without gradients; returns what `passes.run_plan` does."""

_TOLD = ("right", "other", "none")


@dataclass
class Score:
    """How well a structure's noise was predicted.

    Attributes:
        embedded: it has an embedding.
        components: how many components its noise has, three for each atom that was moved.
        zero, zero_mse: sum of |ε|, Å, and mean of ε² / σ².
        absolute: sum of |ε̂ − ε|, Å, by what the noisy pass was told.
        mse: mean of (ε̂ − ε)² / σ², by the same.
    """

    embedded: bool
    components: int
    zero: float
    zero_mse: float
    absolute: dict[str, float] = field(default_factory=dict)
    mse: dict[str, float] = field(default_factory=dict)


class ConditionJudge:
    """Measures what a task's condition is worth.

    First `first` for each batch (or `note_right`, by a caller that has run these passes anyway), then `pair`, then
    `second` for each batch, then `report`. On several ranks all call `pair` and `report`.

    Args:
        model: which has the task.
        task: whose noisy pass is conditioned on an embedding.
        call: the model's.
        structures: a batch as tasks see it.
        names: of a batch's structures, which tell them apart and key their noise.

    Attributes:
        scores: of this rank's structures that have noise, in the order in which they came.

    Raises:
        ConfigError: the task has no such condition.
    """

    def __init__(
        self,
        model: DenoisingModel,
        task: DenoisingTask,
        call: Call,
        structures: Callable[[Any], Structures] = structures_of,
        names: Callable[[Any], list[str]] = identities,
    ) -> None:
        self.model, self.task, self.call = model, task, call
        self.structures, self.names = structures, names
        if model.denoising[task.name].condition is None:
            raise ConfigError(f"{key_of(task.name)}: nothing to judge: its passes are told no embedding")
        self.scores: dict[Key, Score] = {}
        self._mine: dict[Key, Tensor] = {}
        self._told: dict[Key, Tensor] = {}
        self._others: dict[str, Tensor] = {}

    def first(self, batch: Any) -> None:
        """Run the clean pass and the noisy one that is told the right embedding."""
        corruption, passes = self._drawn(batch)
        # Outputs are not judged here.
        needed = tuple(replace(run, outputs=False) for run in passes if run.embed or run.noise)
        out = self._run(batch, needed, returns_embedding=True)
        self.note_right(batch, corruption, noisy_pass(passes), out[NOISE], out[EMBEDDING])

    def note_right(self, batch: Any, corruption: Corruption, noisy: Pass, noise: Tensor, embedding: Tensor) -> None:
        """Take notice of what was predicted told the right embedding.

        Args:
            batch: of B structures and N atoms.
            corruption: of validation.
            noisy: the pass that predicted the noise.
            noise: [N, 3] predicted, in units of the objective's scale.
            embedding: [B, C] that the structures were told.
        """
        embedded, made = noisy.conditioned.tolist(), embedding.float().cpu()
        zero = structure_errors(torch.zeros_like(noise), corruption, self._scale)
        keys = keys_of(batch, self.names)
        for i, key in enumerate(keys):
            components = int(zero.components[i])
            if components:
                self.scores[key] = Score(embedded[i], components, float(zero.absolute[i]), float(zero.mse[i]))
                if embedded[i]:
                    self._mine[key] = made[i]
        self._note("right", keys, corruption, noise)

    def pair(self) -> None:
        """Find every structure's partner. A collective call."""
        mine = list(self._mine.values())
        for keys, embeddings in gathered((list(self._mine), torch.stack(mine) if mine else torch.empty(0))):
            self._told.update(zip(keys, embeddings, strict=True))
        self._told = dict(sorted(self._told.items()))
        self._others = {what: self._told[partner] for what, partner in partners(self._told).items()}

    def second(self, batch: Any) -> None:
        """Run the noisy passes that are told another structure's embedding, and none."""
        if not self._others:
            return
        corruption, passes = self._drawn(batch)
        keys = keys_of(batch, self.names)
        # What structures without an embedding are given is not read.
        unread = next(iter(self._others.values()))
        given = torch.stack([self._others.get(what, unread) for what, _ in keys])
        noisy = noisy_pass(passes)
        for told, run in (
            ("other", replace(noisy, given=given)),
            ("none", replace(noisy, conditioned=None)),
        ):
            self._note(told, keys, corruption, self._run(batch, (run,))[NOISE])

    def report(self) -> ConditionReport | None:
        """What was found, over all ranks: the same on each. None: there is no other structure. A collective call."""
        merged: dict[Key, Score] = {}
        for scores in gathered(self.scores):
            for key, score in scores.items():
                if key not in merged or len(score.absolute) > len(merged[key].absolute):
                    merged[key] = score
        # Where a host ends both sweeps early, a loader that shuffles may have read a structure in one of them alone.
        scores = [score for _, score in sorted(merged.items()) if self._others and len(score.absolute) == len(_TOLD)]
        judged = [score for score in scores if score.embedded]
        if len(judged) < 2:
            return None
        components = sum(score.components for score in scores)
        absolute = {told: sum(score.absolute[told] for score in scores) / components for told in _TOLD}
        mse = {told: torch.tensor([score.mse[told] for score in judged], dtype=torch.float64) for told in _TOLD}
        zero = sum(score.zero_mse for score in judged) / len(judged)
        conditions = self.conditions()
        return ConditionReport(
            structures=len(judged),
            mae=Errors(**absolute, zero=sum(score.zero for score in scores) / components),
            mse=Errors(**{told: float(errors.mean()) for told, errors in mse.items()}, zero=zero),
            gain=Gain.of(mse["right"], mse["other"]),
            gain_over_none=Gain.of(mse["right"], mse["none"]),
            dimensions=participation_ratio(conditions),
            spread=relative_spread(conditions),
            trained_without=getattr(self.task.settings, "condition_drop", None) != 0,
        )

    def conditions(self) -> Tensor:
        """[B, C] what all structures that have an embedding are told, as the blocks get it."""
        head = self.model.denoising[self.task.name].condition.head
        made = torch.stack(list(self._told.values())).to(next(head.parameters()).device)
        with torch.no_grad():
            return head.condition(made, torch.ones(len(made), dtype=torch.bool, device=made.device)).cpu()

    @property
    def _scale(self) -> float | Tensor:
        scale = self.task.objective(1.0).scale
        return self.model.denoising[self.task.name].running_scale.scale if scale is None else scale

    def _drawn(self, batch: Any) -> tuple[Corruption, tuple[Pass, ...]]:
        structures = self.structures(batch)
        corruption = self.task.corrupt(structures, seed=0, step=VALIDATION)
        return corruption, self.task.passes(structures, corruption, seed=0, step=VALIDATION)

    def _run(self, batch: Any, runs: tuple[Pass, ...], *, returns_embedding: bool = False) -> Mapping[str, Tensor]:
        """One call of the model, under the same random numbers every time: some hosts' graphs have random frames."""
        device = batch.pos.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return self.call(batch, Plan(self.task.name, runs, returns_embedding).to(device))

    def _note(self, told: str, keys: list[Key], corruption: Corruption, noise: Tensor) -> None:
        errors = structure_errors(noise, corruption, self._scale)
        for i, key in enumerate(keys):
            if key in self.scores:
                self.scores[key].absolute[told] = float(errors.absolute[i])
                self.scores[key].mse[told] = float(errors.mse[i])


@dataclass(frozen=True)
class StructureErrors:
    """Errors of the noise of B structures; zero for those without any.

    Attributes:
        components: [B] how many components its noise has.
        absolute: [B] sum of |ε̂ − ε| over them, Å.
        mse: [B] mean of (ε̂ − ε)² / σ² over them.
    """

    components: Tensor
    absolute: Tensor
    mse: Tensor


@torch.no_grad()
def structure_errors(noise: Tensor, corruption: Corruption, scale: float | Tensor) -> StructureErrors:
    """How well the noise of each structure was predicted, in float64 on the CPU.

    Args:
        noise: [N, 3] predicted, in units of `scale`.
        corruption: of the B structures, on the CPU.
        scale: Å.
    """
    error = (noise * scale).double().cpu() - corruption.noise.double()
    error = error[corruption.mask]
    structure, count = corruption.batch[corruption.mask], len(corruption.sigma)
    sums = torch.zeros(count, 3, dtype=torch.float64)
    rows = torch.stack([torch.full_like(error, 1.0), error.abs(), error.square()], dim=1).sum(dim=2)
    components, absolute, square = sums.index_add_(0, structure, rows).T
    sigma = corruption.sigma.double()
    mse = square / (components * sigma.square()).where(components > 0, 1.0)
    return StructureErrors(components.long(), absolute, mse)


def partners(keys: Iterable[Key]) -> dict[str, Key]:
    """By what a structure is: the structure whose embedding it is told as another's. None where there is no other."""
    first: dict[str, Key] = {}
    for key in sorted(keys):  # of equal structures the one whose name comes first
        first.setdefault(key[0], key)
    whats = list(first)
    return {what: first[whats[i - 1]] for i, what in enumerate(whats)} if len(whats) > 1 else {}


def keys_of(batch: Any, names: Callable[[Any], list[str]] = identities) -> list[Key]:
    """The key of each structure of a collated batch, whose structures are called so."""
    sizes = torch.as_tensor(batch.natoms).view(-1).tolist()
    parts = [values.detach().cpu().split(sizes) for values in (batch.atomic_numbers.long(), batch.pos)]
    cell = getattr(batch, "cell", None)
    parts.append(list(cell.detach().cpu().view(len(sizes), -1)) if cell is not None else [torch.empty(0)] * len(sizes))
    whats = (
        hashlib.blake2b(b"".join(part.numpy().tobytes() for part in of), digest_size=12).hexdigest()
        for of in zip(*parts, strict=True)
    )
    return list(zip(whats, names(batch), strict=True))


def noisy_pass(passes: tuple[Pass, ...]) -> Pass:
    """The pass of a plan that predicts the noise."""
    return next(run for run in passes if run.noise)
