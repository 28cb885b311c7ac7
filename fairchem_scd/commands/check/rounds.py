"""What `check` does alike on both hosts: a model's parts, rounds of steps, and what a task does to the data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fairchem_scd.commands.check.costs import say_costs
from fairchem_scd.commands.check.report import Report
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.tasks import DenoisingTask

_FAR = 0.25
"""Share of the nearest-neighbour distance. Noise that moves atoms further is reported: they begin to change places."""

_COMPONENTS = 1.6
"""The most components of the noise that SCD's embedding explained in small runs: PaiNN, cells of two atoms.

See docs/condition.md, "Why it explains so little of larger structures".
"""


class AlwaysDrawn:
    """Takes the place of a TaskDraw: every step has the same task."""

    def __init__(self, task: DenoisingTask | None, seed: int) -> None:
        self.task, self.seed = task, seed

    def __call__(self, step: int) -> DenoisingTask | None:
        return self.task


def describe_model(model: Any, report: Report) -> None:
    """Report the number of parameters of each part of the model."""
    parts = {"backbone": model.backbone, **{f"head {name}": head for name, head in model.output_heads.items()}}
    report.say("parameters", ", ".join(f"{name} {_count(part)}" for name, part in parts.items()))
    for name, modules in getattr(model, "denoising", {}).items():
        added = ", ".join(f"{part.replace('_', ' ')} {_count(module)}" for part, module in modules.items())
        report.say("", f"added by {name}, for training alone: {added}")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if frozen:
        report.say("", f"of these {frozen:,} are frozen")


def _count(part: nn.Module) -> str:
    return f"{sum(p.numel() for p in part.parameters()):,}"


def take_rounds(
    tasks: Mapping[str, DenoisingTask],
    step: Callable[[str, DenoisingTask | None], tuple[float, int]],
    report: Report,
    *,
    ordinary: bool,
    repeats: int,
    seconds: float,
    **costs: Any,
) -> None:
    """Take steps of each kind in turn and report what they cost.

    Args:
        tasks: by name; those with a `prob` have steps.
        step: takes a step of a kind, with its task; returns seconds and peak bytes on a GPU.
        report: gets the lines.
        ordinary: the run has steps without a task.
        repeats: timed rounds, after a first round that is not timed.
        seconds: begin no further round after this time.
        costs: further arguments of `say_costs`.
    """
    kinds: dict[str, DenoisingTask | None] = {"ordinary": None} if ordinary else {}
    kinds |= {name: task for name, task in tasks.items() if task.settings.prob}
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    memory: dict[str, int] = {}
    start = time.monotonic()
    for turn in tqdm(range(1 + repeats), desc="rounds of steps", leave=False):
        if turn > 1 and time.monotonic() - start > seconds:
            break
        for name, task in kinds.items():
            with report.part(f"a step of kind '{name}'"):
                took, peak = step(name, task)
                memory[name] = max(peak, memory.get(name, 0))
                if turn:
                    taken[name].append(took)
        if any(not taken[name] for name in kinds) and turn:
            return  # a kind of step does not work, and costs cannot be compared
    times = {name: statistics.median(values) for name, values in taken.items() if values}
    if times:
        probabilities = {name: tasks[name].settings.prob for name in times if name != "ordinary"}
        rounds = min(len(values) for values in taken.values())
        say_costs(times, memory, probabilities, rounds=rounds, report=report, **costs)


def say_idle(name: str, idle: list[str], report: Report) -> None:
    """Report parameters that had no gradient in a step of a kind, if there are any."""
    if idle:
        report.problem(
            f"{len(idle)} parameters have no gradient in a step of kind '{name}', such as {idle[0]}: distributed "
            "training would wait for them"
        )


def say_corruption(name: str, key: str, corruption: Corruption, nearest: np.ndarray, report: Report) -> None:
    """Report which atoms a task moves, and how far compared with the distance to their nearest neighbours.

    Args:
        name: of the task.
        key: of the task in the config.
        corruption: of the structures that were looked at; it moves at least one atom.
        nearest: distances of atoms to their nearest neighbour, Å.
        report: gets the lines.
    """
    lengths = corruption.noise[corruption.mask].norm(dim=-1)
    mean, typical = float(lengths.mean()), float(np.median(nearest))
    report.say(
        name,
        f"moves {100 * float(corruption.mask.float().mean()):.0f} % of the atoms by {mean:.3g} Å on average (at most "
        f"{float(lengths.max()):.3g})",
    )
    if np.isfinite(typical):
        report.say(
            "",
            f"that is {100 * mean / typical:.2g} % of the distance to the nearest neighbour (median {typical:.3g} Å, "
            f"least {float(nearest.min()):.3g} Å)",
        )
        if mean > _FAR * typical:
            report.caution(
                f"{key} moves atoms by {100 * mean / typical:.0f} % of the distance to their nearest neighbour: they "
                "may change places, and then the noise cannot be seen from the structure"
            )
    idle = int((~corruption.corrupted).sum())
    if idle:
        count = len(corruption.sigma)
        report.say("", f"{idle} of {count} structures have nothing to denoise and are left out of its loss")


def say_condition(task: DenoisingTask, key: str, corruption: Corruption, report: Report) -> None:
    """Report what to expect of a task's embedding on structures of this size; nothing for a task without one.

    Args:
        task: of the run.
        key: of the task in the config.
        corruption: of the structures that were looked at; it moves at least one atom.
        report: gets the lines.
    """
    if "self" not in getattr(task.settings, "condition", ()):
        return
    share = float((_COMPONENTS / _components(corruption)).clamp(max=1).mean())
    report.say(
        "",
        f"expect its embedding to explain no more than {100 * share:.2g} % of the noise error that plain denoising "
        "leaves: the noise of N atoms has 3N - 3 components, and in our small runs an embedding explained "
        f"{_COMPONENTS:g} of them or fewer",
    )
    report.say("", f"{key}.condition: [] does without it, at half the cost: docs/pretraining.md")


def _components(corruption: Corruption) -> Tensor:
    """Numbers of components of the noise, of the structures that have any: three an atom that moved, 3 less if all did.

    Where all atoms moved, the mean displacement was taken out.
    """
    count = len(corruption.sigma)
    natoms = torch.bincount(corruption.batch, minlength=count)
    moved = torch.bincount(corruption.batch[corruption.mask], minlength=count)
    return (3 * moved - 3 * (moved == natoms))[corruption.corrupted]
