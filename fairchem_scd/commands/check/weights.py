"""What the noise weighs beside the forces, on the user's own data, and how many force labels a run sees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets import data_list_collater

from fairchem_scd.commands.check import weighing
from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.check.weighing import say_weights, spaced_rows
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.fairchem1.data.guarded import Guarded
from fairchem_scd.fairchem1.trainer.step_state import StepState


def describe_weights(trainer: Any, report: Report) -> None:
    """Report what a model that predicts zero would lose in forces and in noise, and the share of force labels seen.

    Says nothing where the config trains no forces, or sums their loss in the place of a mean.

    Args:
        trainer: of this package, with training data. Its weights stay as they are.
        report: gets the lines.
    """
    dataset: Guarded = trainer.train_loader.dataset
    functions = [info["fn"] for output, info in trainer.loss_functions if output == "forces"]
    tasks = [task for task in trainer.tasks.values() if task.settings.prob]
    if not tasks or not functions or any(fn.reduction != "mean" for fn in functions):
        return
    batch = data_list_collater(spaced_rows(len(dataset), lambda index: dataset.read(index)[0]), otf_graph=True)
    structures = structures_of(batch)
    free_only = bool(trainer.output_targets["forces"]["train_on_free_atoms"])
    say_weights(
        tasks,
        structures,
        labelled=~structures.fixed if free_only else torch.ones_like(structures.fixed),
        forces=forces_of_zero(trainer, batch),
        noise=partial(noise_of_zero, trainer),
        seed=trainer.draw_task.seed,
        length=trainer.config["optim"].get("max_epochs", 1),
        counted="epoch",
        report=report,
    )


def forces_of_zero(trainer: Any, batch: Any) -> float:
    """The force loss of an ordinary step in which the model predicts zero, as the config has it.

    It is the host's own, with the config's coefficient, normaliser and choice of atoms.

    Args:
        trainer: of this package.
        batch: collated, on the CPU.
    """
    batch = batch.clone().to(trainer.device)
    atoms, structures = len(batch.pos), len(batch.natoms)
    out = {
        name: torch.zeros_like(batch[name].view(atoms if output["level"] == "atom" else structures, -1))
        for name, output in trainer.output_targets.items()
        if name in batch
    }
    trainer.model.train()
    trainer._step = step = StepState()
    trainer._compute_loss(out, batch)
    trainer._step = None
    return float(step.terms["forces_loss"])


def noise_of_zero(trainer: Any, task: DenoisingTask, draws: Sequence[Corruption]) -> float:
    """The noise's loss where the model predicts zero at the start of a run: λ times the mean over corrupted atoms.

    Args:
        trainer: of this package.
        task: one of its tasks.
        draws: corruptions of structures, at least one of which moved an atom.
    """
    objective = task.objective(0.0)
    scale = objective.scale if objective.scale is not None else float(trainer._running_scale(task).scale)
    if weighing.replaces_forces(task):
        fn = next(info["fn"].loss_fn for output, info in trainer.loss_functions if output == "forces")
    else:
        fn = registry.get_loss_class(objective.loss)()
    return weighing.noise_of_zero(fn, draws, scale=scale, coefficient=objective.coefficient)
