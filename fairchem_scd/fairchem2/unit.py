"""The host's unit of training and validation, with denoising steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.common.distutils import get_device_for_local_rank
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import MLIPEvalUnit, MLIPTrainEvalUnit, Task
from torch import nn
from torchtnt.framework import State

from fairchem_scd.denoising.condition_report import ConditionReport
from fairchem_scd.denoising.config_keys import block_called
from fairchem_scd.denoising.plan import VALIDATION, Plan
from fairchem_scd.denoising.random import stream
from fairchem_scd.denoising.tasks import DenoisingTask, TaskDraw
from fairchem_scd.fairchem2 import checkpoint, rows
from fairchem_scd.fairchem2.batch import structures_of
from fairchem_scd.fairchem2.data_faults import TrainingFaults
from fairchem_scd.fairchem2.finite import FiniteGradients
from fairchem_scd.fairchem2.judging import JudgedValidation
from fairchem_scd.fairchem2.loss import tasks_of
from fairchem_scd.fairchem2.metrics import LoggerWith, Measured, prefixed
from fairchem_scd.fairchem2.model import unwrapped, with_plan
from fairchem_scd.fairchem2.setup import KEY, prepare, without_tasks
from fairchem_scd.fairchem2.step import DenoisingStep, Step


class DenoisingTrainEvalUnit(MLIPTrainEvalUnit):
    """The host's unit, in which steps of training may have a denoising task.

    Where the denoising block turns on no task, this is the host's unit exactly. Otherwise the random numbers of a
    step, of which the host draws some in every pass, come from (seed, step, rank): a resumed run goes on as if it had
    not stopped.

    Args:
        job_config, model, optimizer_fn, cosine_lr_scheduler_fn, tasks: of the host. The model is converted in place.
        denoising: the denoising block: tasks and their settings.
        host: further arguments of the host's unit.

    Attributes:
        setup: what the block asks for.
        condition_report: what the latest validation says of SCD's condition; None: it was not judged.

    Raises:
        ConfigError: the run cannot be trained as written; the message names the key and what would be right.
    """

    def __init__(
        self,
        job_config: Any,
        model: nn.Module,
        optimizer_fn: Callable[..., torch.optim.Optimizer],
        cosine_lr_scheduler_fn: Callable[..., Any],
        tasks: Sequence[Task],
        denoising: Any = None,
        **host: Any,
    ) -> None:
        setup = prepare(job_config, model, tasks, denoising, host)
        super().__init__(job_config, model, optimizer_fn, cosine_lr_scheduler_fn, tasks, **host)
        self.setup = setup
        self.condition_report: ConditionReport | None = None
        if not setup.tasks:
            logging.warning(without_tasks(setup.settings))
            return
        self.draw_task = TaskDraw(setup.tasks, job_config.seed)
        self._faults = TrainingFaults(skip=setup.settings.on_bad_data == "skip")
        self._finite = FiniteGradients(self.optimizer)
        self._printed, self._validated = Measured(), Measured()  # since the last line on the console; in validation
        self._judged: JudgedValidation | None = None

    # --- before the first step ------------------------------------------------------------------------------------

    @block_called(KEY)
    def on_train_start(self, state: State) -> None:
        """As the host's, after the data were checked: see `Guarded` and `check_sample`.

        Raises:
            ConfigError, DataError: the data cannot be trained on; the message names the row or the key.
        """
        if self.setup.tasks:
            self._check_data(state)
        super().on_train_start(state)

    def _check_data(self, state: State) -> None:
        adapter = unwrapped(self.model).adapter
        check = rows.row_check(self.tasks, adapter)
        for phase in filter(None, (state.train_state, state.eval_state)):
            rows.check_loader(phase.dataloader, self.tasks)
            for guarded in rows.guard(phase.dataloader, check):
                guarded.keep_spare()
                if phase is state.train_state or self.setup.self_supervised:
                    rows.check_sample(guarded, self.setup.tasks, self.tasks, adapter, skip=self._faults.skip)

    def _execute_load_state(self, checkpoint_location: str | None) -> None:
        """As the host's. What denoising adds starts fresh where the checkpoint is of a run without it.

        Raises:
            ConfigError: the checkpoint is of another model.
        """
        missing: set[str] = set()
        if self.setup.tasks and checkpoint_location is not None:
            missing = checkpoint.missing_keys(checkpoint_location, self.state_dict())
        if not missing:
            super()._execute_load_state(checkpoint_location)
            return
        checkpoint.check_only_added(checkpoint_location, missing)
        self.load_state_dict(checkpoint.load_known(checkpoint_location, self.state_dict()))
        for name, parameter in unwrapped(self.model).named_parameters():
            if checkpoint.lacks(missing, name):
                self.optimizer.state.pop(parameter, None)
        logging.warning("%s lacks weights that %s adds: they start fresh", checkpoint_location, KEY)

    # --- training -------------------------------------------------------------------------------------------------

    def train_step(self, state: State, data: AtomicData) -> None:
        if not self.setup.tasks:
            super().train_step(state, data)
            return
        number = self.train_progress.num_steps_completed
        self._seed(number, "random numbers")
        task = self.draw_task(number)
        with block_called(KEY):  # not around the method: the host's loop looks at its signature
            self._faults.note(data.get("bad_data", ()), data.get("no_good_row", ()))
            self._faults.tell_ranks(torch.device(get_device_for_local_rank()))
            step = Step() if task is None else self._corrupted(data, task, number, _progress(state, number))
            watched = self._finite.watched(number, self._faults.stop_if_told, self.ema_model)
            with _in_step(self, step, data, self.model), watched:
                super().train_step(state, data)
        self._printed.update(step.measured)
        if number % self.print_every == 0:
            means, self._printed = self._printed.means(), Measured()
            logging.info({"train/step": number, **prefixed("train", means)})

    def _corrupted(self, data: AtomicData, task: DenoisingTask, number: int, progress: float = 0.0) -> DenoisingStep:
        """A step of a task: the batch is corrupted on the CPU, before the host moves anything to the device."""
        model = unwrapped(self.model)
        structures = structures_of(data, model.adapter.periodic(data.pbc), self.tasks)
        seed = self.draw_task.seed if number != VALIDATION else 0
        corruption = task.corrupt(structures, seed=seed, step=number)
        passes = task.passes(structures, corruption, seed=seed, step=number)
        objective, device = task.objective(progress), next(model.parameters()).device
        if objective.scale is None:
            running = model.denoising[task.name].running_scale
            if number != VALIDATION:
                running.update(corruption.noise[corruption.mask], distutils.all_reduce)
            objective = replace(objective, scale=running.scale)
        plan = Plan(task.name, passes, returns_embedding=number == VALIDATION).to(device)
        return DenoisingStep(task=task, corruption=corruption, plan=plan, objective=objective, device=device)

    def _seed(self, number: int, what: str) -> None:
        """Set the random numbers of what follows from (seed, step, rank)."""
        key = stream(self.draw_task.seed, number, f"{what} of rank {distutils.get_rank()}")
        torch.manual_seed(int(key.integers(2**63)))

    def on_train_end(self, state: State) -> None:
        super().on_train_end(state)
        if self.setup.tasks:
            self._finite.report()
            self._faults.report()
        if self.condition_report is not None and distutils.is_master():
            report = self.condition_report
            logging.info("%s\n%s", report.sentence(supervised=not self.setup.self_supervised), report.numbers())

    # --- validation -----------------------------------------------------------------------------------------------

    def on_eval_epoch_start(self, state: State) -> None:
        super().on_eval_epoch_start(state)
        if self.setup.tasks:
            self._seed(self.train_progress.num_steps_completed, "validation")
            task, validated = self.setup.judged_task, self.eval_unit
            self._judged = task and JudgedValidation(unwrapped(validated.model), task, self.tasks, tf32=validated.tf32)

    def eval_step(self, state: State, data: AtomicData) -> None:
        """As the host's. In pre-training there is nothing else to judge by, so the noise of validation is predicted."""
        if not self.setup.tasks:
            super().eval_step(state, data)
            return
        with block_called(KEY):
            self._faults.note(data.get("bad_data", ()), data.get("no_good_row", ()))
            if self.setup.self_supervised:
                self._predict_noise(state, data)
                return
            if self._judged is not None:
                self._judged.first(data)
        super().eval_step(state, data)

    def _predict_noise(self, state: State, data: AtomicData) -> None:
        """A step of validation in pre-training."""
        step = self._corrupted(data, self.setup.validated_task, VALIDATION)
        with _in_step(self.eval_unit, step, data, self.eval_unit.model):
            super().eval_step(state, data)
        noise = step.corruption.noise.to(step.device)
        step.measured.add_errors("denoising_pos_mae_zero", noise.abs(), step.moved)
        self._validated.update(step.measured)
        if self._judged is not None:
            self._judged.note(data, step)

    @block_called(KEY)
    def on_eval_epoch_end(self, state: State) -> None:
        if self.setup.tasks:
            self._faults.stop_if_any()
            # `fairchem-scd plot` reads this line: the host's own, which follow, do not say when they are from.
            logging.info("Validation after %d steps", self.train_progress.num_steps_completed)
        super().on_eval_epoch_end(state)
        found: dict[str, float] = {}
        if self.setup.tasks and self.setup.self_supervised:
            found, self._validated = self._validated.means_of_all_ranks(), Measured()
        if self.setup.tasks and self._judged is not None:
            judged, self._judged = self._judged, None
            self.condition_report = judged.report(state.eval_state.dataloader)
            found |= {} if self.condition_report is None else self.condition_report.metrics()
        if found:
            values = prefixed("val", found)
            logging.info(values)
            if self.logger is not None:
                self.logger.log(values, commit=False)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save_state(self, checkpoint_location: str) -> None:
        """Write a checkpoint as the host does, but for the inference checkpoint, which is of the plain model."""
        if not self.setup.tasks:
            super().save_state(checkpoint_location)
            return
        wanted, self.save_inference_ckpt = self.save_inference_ckpt, False
        try:
            super().save_state(checkpoint_location)
        finally:
            self.save_inference_ckpt = wanted
        if wanted and distutils.is_master():
            checkpoint.write_plain(Path(checkpoint_location))


@contextmanager
def _in_step(unit: MLIPTrainEvalUnit | MLIPEvalUnit, step: Step, data: AtomicData, model: nn.Module) -> Iterator[None]:
    """While entered, a step of a host's unit is the given one: with its passes, its losses, and its errors in the log.

    Args:
        unit: of the host.
        step: what it is to do.
        data: the batch that it is given.
        model: the one that it runs, in its wrappers.
    """
    tasks, logger, plan = unit.tasks, unit.logger, nullcontext()
    if isinstance(step, DenoisingStep):
        plan = with_plan(unwrapped(model), step.plan, partial(step.receive, data=data))
    unit.tasks = tasks_of(step, tasks)
    unit.logger = logger and LoggerWith(logger, step.measured)
    try:
        with plan:
            yield
    finally:
        unit.tasks, unit.logger = tasks, logger


def _progress(state: State, number: int) -> float:
    """The share of the training steps that is done, 0 to 1; 0 where nobody said how many there are."""
    train = state.train_state
    ends = [train.max_steps] if train.max_steps is not None else []
    if train.max_epochs is not None:
        ends.append(train.max_epochs * len(train.dataloader))
    return min(number / max(min(ends), 1), 1.0) if ends else 0.0
