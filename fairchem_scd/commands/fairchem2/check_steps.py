"""A few steps of each kind, taken as the host takes them: do they work, and what do they cost?"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torchtnt.framework.state import EntryPoint, PhaseState, State

from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.check.rounds import AlwaysDrawn, say_idle, take_rounds
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit


class Steps:
    """Single steps of a runner's unit.

    Args:
        runner: of the host, in this process alone. Its unit's weights change.
    """

    def __init__(self, runner: Any) -> None:
        self.unit: DenoisingTrainEvalUnit = runner.train_eval_unit
        self.loader = runner.train_dataloader
        phase = PhaseState(dataloader=self.loader, max_epochs=runner.max_epochs, max_steps=runner.max_steps)
        self.state = State(entry_point=EntryPoint.TRAIN, train_state=phase)
        self.unit.on_train_start(self.state)
        self.device = next(self.unit.model.parameters()).device
        self._idle: list[str] = []
        self.unit.optimizer.register_step_pre_hook(self._note_idle)

    def take(self, batch: AtomicData, task: DenoisingTask | None) -> tuple[float, int, list[str]]:
        """One step: seconds, peak bytes on a GPU, and names of parameters that had no gradient.

        Raises:
            ConfigError: the loss or a gradient is not finite.
        """
        unit, on_gpu = self.unit, self.device.type == "cuda"
        unit.draw_task = AlwaysDrawn(task, unit.draw_task.seed)
        skipped, batch = len(unit._finite.skipped), copy.deepcopy(batch)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        unit.train_step(self.state, batch)
        if on_gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        unit.train_progress.increment_step()
        if not math.isfinite(float(unit.last_loss)) or len(unit._finite.skipped) > skipped:
            raise ConfigError(f"the loss is {float(unit.last_loss):g}, or its gradients are not finite")
        return took, torch.cuda.max_memory_allocated() if on_gpu else 0, self._idle

    def _note_idle(self, *_: Any) -> None:
        named = self.unit.model.module.named_parameters()
        self._idle = [name for name, p in named if p.requires_grad and p.grad is None]


def try_steps(runner: Any, report: Report, *, repeats: int, seconds: float) -> None:
    """Take steps of each kind in turn and report what they cost.

    Args:
        runner: of the host, with a unit of this package. Its weights change.
        report: gets the lines.
        repeats: timed rounds, after a first round that is not timed.
        seconds: begin no further round after this time.
    """
    setup = runner.train_eval_unit.setup
    if not setup.tasks:
        return
    steps, batch = Steps(runner), next(iter(runner.train_dataloader))

    def step(name: str, task: DenoisingTask | None) -> tuple[float, int]:
        took, peak, idle = steps.take(batch, task)
        say_idle(name, idle, report)
        return took, peak

    take_rounds(
        setup.tasks,
        step,
        report,
        ordinary=not setup.self_supervised,
        repeats=repeats,
        seconds=seconds,
        batch=len(batch.natoms),
        steps_per_epoch=len(runner.train_dataloader),
        device=steps.device.type,
    )


def try_validation(runner: Any, report: Report) -> None:
    """Validate on one batch."""
    unit, batch = runner.train_eval_unit, next(iter(runner.eval_dataloader))
    state = State(entry_point=EntryPoint.EVALUATE, eval_state=PhaseState(dataloader=runner.eval_dataloader))
    unit.on_eval_epoch_start(state)
    unit.eval_step(state, copy.deepcopy(batch))
    metrics = unit.eval_unit.on_eval_epoch_end(state)
    unit.on_eval_epoch_end(state)
    errors = ", ".join(f"{name.removeprefix('val/')} {value:.4g}" for name, value in metrics.items() if "," in name)
    report.say("validation", f"works, with batches of {len(batch.natoms)}: {errors or 'the noise is predicted'}")
