"""One step of training or validation, between the calls of the host's loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.modules.evaluator import mae
from torch import Tensor

import fairchem_scd.fairchem1.trainer.losses as losses
from fairchem_scd.denoising.data_faults import DataFaults
from fairchem_scd.denoising.loss import Ranks
from fairchem_scd.denoising.parse_settings import Denoising
from fairchem_scd.denoising.plan import EMBEDDING, NOISE, VALIDATION, Plan
from fairchem_scd.denoising.running_scale import RunningScale
from fairchem_scd.denoising.tasks import DenoisingTask, TaskDraw
from fairchem_scd.fairchem1.backbones import adapter_for
from fairchem_scd.fairchem1.config import outputs_of_heads_named
from fairchem_scd.fairchem1.data import rows as data_rows
from fairchem_scd.fairchem1.hydra import view_of, with_plan
from fairchem_scd.fairchem1.trainer.losses import loss_functions_replaced
from fairchem_scd.fairchem1.trainer.step_state import DenoisingStep, StepState


class StepMixin:
    """What this package does between the calls of the host's loop. For a host trainer with `SetupMixin`.

    The host calls, for each batch and in this order (fairchem/core/trainers/ocp_trainer.py and base_trainer.py):

    1. `_forward(batch)` in `train`, `validate` and `predict`. Makes `self._step`, the state of the step: draws the task
       and corrupts the batch on the CPU. Then the host moves the batch to the device and calls the model once, which
       runs all passes of the step.
    2. `_compute_loss(out, batch)` in `train` and `validate`. The host's own loss, over stand-ins for the config's loss
       functions, and the noise term. In training the ranks tell each other of bad rows.
    3. `_compute_metrics(out, batch, evaluator, metrics)` in `train` and `validate`. Errors and loss terms for the log;
       ends the run where a rank has met a bad row. Validation is done with the step here.
    4. `_backward(loss)` in `train`, after the host has read the loss. The step is over.

    Once after the last batch of `validate` comes `_aggregate_metrics(metrics)`.

    Prediction never corrupts. Validation does in pre-training alone, where there is nothing else to judge by; what
    `judging` adds comes after its last batch.

    Attributes:
        structures_left_out: how many structures of denoising steps had nothing to denoise, on this rank.
    """

    tasks: dict[str, DenoisingTask]
    denoising: Denoising
    draw_task: TaskDraw
    self_supervised: bool
    data_faults: DataFaults

    def __init__(self, **config: Any) -> None:
        self._step: StepState | None = None
        self._validating = False
        self.structures_left_out = 0
        super().__init__(**config)

    # --- 1. forward -----------------------------------------------------------------------------------------------

    def _forward(self, batch: Any) -> dict[str, Tensor]:
        self._step = step = self._begin(batch)
        plan = step.plan if isinstance(step, DenoisingStep) else None
        sizes = "optim.batch_size and optim.eval_batch_size"
        with (
            outputs_of_heads_named(),
            data_rows.neighbours_needed(self._unwrapped_model.backbone, partial(_views, batch, plan), sizes),
            nullcontext() if plan is None else with_plan(self.model, plan) as returned,
        ):
            out = super()._forward(batch)
        if isinstance(step, DenoisingStep):
            step.noise, step.embedding = returned[NOISE].float(), returned.get(EMBEDDING)
        if not self.model.training and not self._validating:
            self._step = None  # of a prediction nothing follows
        return out

    def _begin(self, batch: Any) -> StepState:
        if not self.model.training and not self._validating:
            return StepState()
        self.data_faults.note(getattr(batch, "bad_data", ()))
        if self.model.training:
            if self.denoising.drop_path is not None:
                adapter_for(self._unwrapped_model.backbone).set_drop_path(self.denoising.drop_path.rate(self.step))
            task = self.draw_task(self.step)
            return StepState() if task is None else self._corrupt(batch, task, self.draw_task.seed, self.step)
        if self.self_supervised:
            return self._corrupt(batch, self._validated_task, 0, VALIDATION)
        return StepState()

    @property
    def _validated_task(self) -> DenoisingTask:
        """The task whose noise validation corrupts with, in pre-training."""
        return next(task for task in self.tasks.values() if task.settings.prob)

    def _corrupt(self, batch: Any, task: DenoisingTask, seed: int, number: int) -> DenoisingStep:
        """Corrupt the batch for a task, all on the CPU, before anything is moved to the device."""
        structures = self._unwrapped_model.structures_of(batch)
        corruption = task.corrupt(structures, seed=seed, step=number)
        passes = task.passes(structures, corruption, seed=seed, step=number)
        progress = self.step / max(self.config["optim"].get("max_epochs", 1) * len(self.train_loader or ()), 1)
        objective = task.objective(min(progress, 1.0))
        scale_before = None
        if objective.scale is None:
            running = self._running_scale(task)
            if number != VALIDATION:
                scale_before = _copied(running)
                running.update(corruption.noise[corruption.mask], distutils.all_reduce)
            objective = replace(objective, scale=running.scale)
        return DenoisingStep(
            task=task,
            corruption=corruption,
            plan=Plan(task.name, passes, returns_embedding=number == VALIDATION).to(self.device),
            objective=objective,
            fixed=structures.fixed,
            scale_before=scale_before,
        )

    def _running_scale(self, task: DenoisingTask) -> RunningScale:
        return self._unwrapped_model.denoising[task.name].running_scale

    # --- 2. loss --------------------------------------------------------------------------------------------------

    def _compute_loss(self, out: dict[str, Tensor], batch: Any) -> Tensor:
        step, training = self._step, self.model.training
        if not training and not isinstance(step, DenoisingStep):
            return super()._compute_loss(out, batch)
        ranks = Ranks(distutils.get_world_size(), partial(distutils.all_reduce, device=self.device))
        if not isinstance(step, DenoisingStep) or step.objective.clean:
            functions = losses.recorded(self.loss_functions, step.terms)
        else:
            batch = losses.with_trained_atoms(step, batch)
            functions = losses.of_corrupted_structures(
                step, self.loss_functions, self.output_targets, batch.natoms, ranks
            )
        with loss_functions_replaced(self, functions):
            loss = super()._compute_loss(out, batch)
        if isinstance(step, DenoisingStep) and not step.noise_for_forces:
            loss = loss + losses.noise_term(step, ranks)
        if training and not self.data_faults.skip:
            step.ranks_affected = self.data_faults.ranks_affected(self.device)
        return loss

    # --- 3. metrics -----------------------------------------------------------------------------------------------

    def _compute_metrics(
        self, out: dict[str, Tensor], batch: Any, evaluator: Any, metrics: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        step, metrics = self._step, metrics or {}
        denoises = isinstance(step, DenoisingStep)
        if not denoises or (step.objective.clean and self.output_targets):
            metrics = super()._compute_metrics(out, batch, evaluator, metrics)
        if denoises:
            metrics = self._denoising_errors(step, out, batch, evaluator, metrics)
        if denoises and not step.noise_for_forces:
            idle = int((~step.corruption.corrupted).sum())
            self.structures_left_out += idle if self.model.training else 0
            share = {"total": idle, "numel": len(step.corruption.sigma)}
            metrics = evaluator.update("denoising_left_out", share, metrics)
        if step is not None:
            metrics = self._loss_terms(step, evaluator, metrics)
        if not self.model.training:
            self._step = None
        return metrics

    def _denoising_errors(
        self, step: DenoisingStep, out: dict[str, Tensor], batch: Any, evaluator: Any, metrics: dict[str, Any]
    ) -> dict[str, Any]:
        denormalised = {name: self._denorm_preds(name, value.detach(), batch) for name, value in out.items()}
        found = losses.errors(step, denormalised, batch, self.output_targets, of_zero=not self.model.training)
        for name, prediction, target in found:
            if not self.model.training:
                # In validation the host sums each metric over ranks, so all need the same names.
                metrics.setdefault(name, {"metric": 0.0, "total": 0, "numel": 0})
            if len(prediction):  # the host divides by the count
                metrics = evaluator.update(name, mae({name: prediction}, {name: target}, name), metrics)
        return metrics

    def _loss_terms(self, step: StepState, evaluator: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """The step's loss terms added to the metrics; DataError where a rank has met a bad row that ends the run."""
        values = list(step.terms.values())
        if step.ranks_affected is not None:
            values.append(step.ranks_affected)
        # One transfer for all, where the host has waited for the device already.
        read = torch.stack(values).tolist() if values else []
        if step.ranks_affected is not None and read.pop():
            self.data_faults.stop_if_any()
        for name, value in zip(step.terms, read, strict=True):
            metrics = evaluator.update(name, value, metrics)
        return metrics

    # --- 4. after the step ----------------------------------------------------------------------------------------

    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss)
        self._step = None

    @contextmanager
    def _without_open_step(self) -> Iterator[None]:
        step = self._step
        if not isinstance(step, DenoisingStep) or step.scale_before is None:
            yield
            return
        running = self._running_scale(step.task)
        now = _copied(running)
        running.load_state_dict(step.scale_before)
        try:
            yield
        finally:
            running.load_state_dict(now)

    # --- validation -----------------------------------------------------------------------------------------------

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        with self.validating():
            return super().validate(*args, **kwargs)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """While entered, a forward in eval mode is of validation; otherwise it is of prediction."""
        self._validating = True
        try:
            yield
        finally:
            self._validating = False

    def _aggregate_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        self.data_faults.stop_if_any()
        return super()._aggregate_metrics(metrics)


def _copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _views(batch: Any, plan: Plan | None) -> Iterator[tuple[list[str], Any]]:
    """The batch, and the subsets of its atoms that a plan's passes saw, each with the names of its structures."""
    names = data_rows.names_of(batch)
    yield names, batch
    for run in plan.passes if plan is not None else ():
        if run.subset is not None:
            yield [names[i] for i in run.subset.structures.tolist()], view_of(batch, run)
