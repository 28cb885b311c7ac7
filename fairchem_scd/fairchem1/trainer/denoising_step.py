"""A denoising step under way: what it trains, and what it is judged by."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import Objective, Plan
from fairchem_scd.fairchem1.trainer.loss_functions import (
    HostLoss,
    Hybrid,
    LossTerms,
    Ranks,
    RecordedLoss,
    UncorruptedOnly,
)


@dataclass
class Step:
    """A denoising step of one task, over a batch of B structures and N atoms.

    Row numbers are found on the CPU, where the corruption was drawn, so that indexing never waits for the device.

    Attributes:
        corruption: on the CPU.
        plan: the passes, on the model's device.
        objective: what to train.
        fixed: [N] bool, on the CPU.
        outputs: the host's settings of each output: its level, and whether it trains and is judged on free atoms only.
        noise: [N, 3] predicted, in units of the objective's scale, on the model's device; set by the forward.
    """

    corruption: Corruption
    plan: Plan
    objective: Objective
    fixed: Tensor
    outputs: Mapping[str, Mapping[str, Any]]
    noise: Tensor | None = None

    def trained(self, batch: Any) -> Any:
        """The batch as the host's loss loop is to see it.

        Where noise takes the place of forces, fixed atoms that were corrupted all the same train too.
        """
        if self.objective.loss is not None:
            return batch
        batch = copy.copy(batch)
        batch.fixed = (self.fixed & ~self.corruption.mask).to(batch.fixed)
        return batch

    def loss_functions(
        self, functions: Sequence[tuple[str, dict[str, Any]]], natoms: Tensor, ranks: Ranks, parts: LossTerms
    ) -> list[tuple[str, dict[str, Any]]]:
        """Stand-ins for the config's loss functions, in their order.

        Args:
            functions: (output, {fn, coefficient}) as the host keeps them.
            natoms: [B] on the model's device.
            ranks: for means over all ranks.
            parts: where the parts of the loss are noted.
        """
        stand_ins, noise_coefficient = [], self.objective.coefficient
        for target, info in functions:
            if target == "forces" and self.objective.loss is None:
                fn = self._hybrid(info, noise_coefficient, ranks, parts)
                noise_coefficient = 0.0  # a second force loss does not count the noise again
            else:
                fn = info["fn"] if self._trains(target) else self._left_out(target, info["fn"], natoms, ranks)
                label = "force" if target == "forces" else target  # as DeNS has it
                fn = RecordedLoss(fn, info["coefficient"], parts, f"denoising_{label}_loss")
            stand_ins.append((target, {"fn": fn, "coefficient": 1}))
        return stand_ins

    def noise_term(self, fn: HostLoss, ranks: Ranks, parts: LossTerms) -> Tensor:
        """The noise as a term of its own, a mean over the corrupted atoms of all ranks."""
        rows = self.corruption.mask.nonzero()[:, 0]
        items = fn.loss_fn(self.noise[rows.to(self.noise.device)], self._noise_target(rows), None)
        term = self.objective.coefficient * ranks.reduce(fn, items)
        parts.note("denoising_pos_loss", term)
        return term

    def judged(self, out: Mapping[str, Tensor], batch: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Pairs to compare, under the names of their errors: (name, prediction, target), in the data's units.

        Args:
            out: denormalised predictions by output.
            batch: with the labels, on the model's device.
        """
        for name, prediction in () if self.objective.clean else out.items():
            hybrid = name == "forces" and self.objective.loss is None
            if not hybrid and not self._trains(name):
                continue
            rows = self._rows(name, ~self.fixed, "eval_on_free_atoms", len(prediction))
            if hybrid:
                rows = rows[~self.corruption.mask[rows]]
            rows = rows.to(prediction.device)
            label = "force" if name == "forces" else name
            yield f"denoising_{label}_mae", prediction[rows], batch[name].view(len(prediction), -1)[rows]
        rows = self.corruption.mask.nonzero()[:, 0]
        noise = self.noise.detach()[rows.to(self.noise.device)] * self.objective.scale
        yield "denoising_pos_mae", noise, self.corruption.noise[rows].to(noise.device)

    def _trains(self, target: str) -> bool:
        return self.objective.outputs is None or target in self.objective.outputs

    def _rows(self, target: str, free: Tensor, setting: str, count: int) -> Tensor:
        """Row numbers of an output that the host keeps: some of the atoms, or all of `count` structures."""
        if self.outputs[target]["level"] != "atom":
            return torch.arange(count)
        return (free if self.outputs[target][setting] else torch.ones_like(free)).nonzero()[:, 0]

    def _trained_rows(self, target: str) -> Tensor:
        corruption, free = self.corruption, ~self.fixed
        if self.objective.loss is None:
            free |= corruption.mask
        return self._rows(target, free, "train_on_free_atoms", len(corruption.sigma))

    def _noise_target(self, rows: Tensor) -> Tensor:
        return self.corruption.noise[rows].to(self.noise.device) / self.objective.scale

    def _hybrid(self, info: Mapping[str, Any], noise_coefficient: float, ranks: Ranks, parts: LossTerms) -> Hybrid:
        rows = self._trained_rows("forces")
        return Hybrid(
            info["fn"],
            ranks,
            parts,
            force_coefficient=info["coefficient"],
            noise_coefficient=noise_coefficient,
            noise=self.noise[rows.to(self.noise.device)],
            noise_target=self._noise_target(rows),
            corrupted=self.corruption.mask[rows, None].to(self.noise.device),
        )

    def _left_out(self, target: str, fn: HostLoss, natoms: Tensor, ranks: Ranks) -> UncorruptedOnly:
        rows = self._trained_rows(target)
        per_atom = self.outputs[target]["level"] == "atom"
        structure = self.corruption.batch[rows] if per_atom else rows
        keep = (~self.corruption.corrupted[structure]).nonzero()[:, 0].to(natoms.device)
        return UncorruptedOnly(fn, ranks, keep, natoms if per_atom else natoms[keep])
