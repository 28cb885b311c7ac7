"""The trainers: the host's, with a denoising task drawn for some of the steps.

A step, from top to bottom: draw its task, corrupt the batch, run the passes in one call of the model, replace the force
loss, note the errors. The loop, the loaders, the optimiser and everything distributed are the host's.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2.trainers.forces_trainer import EquiformerV2ForcesTrainer
from fairchem.core.models.esen.trainers.trainer import MLIPTrainer
from fairchem.core.modules.evaluator import Evaluator, mae
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage
from fairchem.core.modules.loss import DDPLoss
from fairchem.core.trainers import OCPTrainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fairchem_scd.denoising.plan import NOISE, VALIDATION, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.denoising.tasks import DenoisingTask, TaskDraw, build_tasks
from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1 import checkpoint as checkpoints
from fairchem_scd.fairchem1 import pretraining
from fairchem_scd.fairchem1.backbones import adapter_for
from fairchem_scd.fairchem1.data import rows as data_rows
from fairchem_scd.fairchem1.data.cell_repeats import RepeatedCells, check_outputs
from fairchem_scd.fairchem1.data.guarded import Guarded, check_row
from fairchem_scd.fairchem1.data.numbered import Numbered, named
from fairchem_scd.fairchem1.data.sources import check_source
from fairchem_scd.fairchem1.dens_aliases import denoising_block
from fairchem_scd.fairchem1.hydra import view_of, with_plan
from fairchem_scd.fairchem1.legacy import to_hydra
from fairchem_scd.fairchem1.trainer.denoising_step import Step
from fairchem_scd.fairchem1.trainer.loss_functions import LossTerms, Ranks, RecordedLoss
from fairchem_scd.fairchem1.trainer.resume import ResumableMixin


class DenoisingMixin(ResumableMixin):
    """Denoising on top of a host trainer. Put before the trainer among the bases.

    Raises:
        ConfigError: on construction, where the config or a sample of the data rules out what it asks for.
    """

    def __init__(self, **config: Any) -> None:
        if config.get("gp_gpus"):
            raise ConfigError("--gp-gpus: denoising does not run with graph parallelism; leave it out")
        task, optim = config["task"] or {}, config["optimizer"] or {}
        model, dens = to_hydra(config["model"])
        block = denoising_block(task, optim, dens)
        self.self_supervised = pretraining.is_self_supervised(config["outputs"], config["loss_functions"])
        self.tasks, self.denoising = build_tasks(block, supervised=not self.self_supervised)
        if self.self_supervised:
            pretraining.check_tasks(self.tasks)
        elif self.tasks:
            pretraining.check_supervised(config)
        if self.tasks:
            model["denoising"] = block
        else:
            logging.warning("task.denoising turns on no task: this trains as the host's trainer would")
            if not model.get("legacy_weight_decay"):
                model["name"] = "hydra"
                model.pop("legacy_weight_decay", None)
            model.pop("denoising", None)
        config["model"] = model
        if self.self_supervised:
            pretraining.prepare(config)
        self._step: Step | None = None
        self._parts = LossTerms()
        self._validating = False
        self._inference_only = config.get("inference_only", False)
        self._left_out = self._bad_rows = 0
        self._bad_row: str | None = None
        self._scale_before: tuple[Any, dict[str, Tensor]] | None = None
        super().__init__(**config)

    # --- setting up -----------------------------------------------------------------------------------------------

    def load_task(self) -> None:
        """Fill in metrics the host has no defaults for under a dotted trainer's name; check outputs and data paths."""
        self.config["evaluation_metrics"] = _with_defaults(
            self.config.get("evaluation_metrics"), self.config["outputs"]
        )
        super().load_task()
        trained = {name for loss in self.config["loss_functions"] for name in loss}
        for task in self.tasks.values():
            task.check(self.output_targets, trained)
        if self.denoising.repeat_cells is not None:
            self._per_atom = check_outputs(self.output_targets)
        # A model loaded to predict has no use for the data it was trained on.
        splits = () if self._inference_only else ("train", "val", "test")
        for split, key in zip(splits, ("dataset", "val_dataset", "test_dataset"), strict=False):
            check_source(f"dataset.{split}", self.config[key], self.config["dataset"])

    def load_model(self) -> None:
        super().load_model()
        self.draw_task = TaskDraw(self.tasks, self.config["cmd"]["seed"] or 0)
        model = self._unwrapped_model
        if self.output_targets and not model.output_heads:
            raise ConfigError(
                "model.heads: none, but outputs names some; fine-tuning from pre-training needs new heads"
            )
        start = (self.config["model"].get("finetune_config") or {}).get("starting_checkpoint")
        if start and self.config["model"].get("backbone") is not None:
            logging.warning(
                "model.finetune_config: model.backbone is given too, so the backbone starts from scratch; leave it "
                "out, or say `backbone: null` where it is included"
            )
        elif start and self.tasks:
            checkpoints.carry_over(model, start)
        if self.denoising.drop_path is not None:
            adapter_for(model.backbone).set_drop_path(self.denoising.drop_path.start)
        if self.self_supervised:
            model.self_supervised = True
            pretraining.freeze(model)
            if distutils.initialized():
                # What is frozen after wrapping would be waited for.
                self.model = DistributedDataParallel(model)

    def load_datasets(self) -> None:
        """Load the host's datasets and check a sample of the data."""
        super().load_datasets()
        for split in ("train", "val") if self.self_supervised else ("train",):
            loader = getattr(self, f"{split}_loader")
            if loader is not None:  # whose dataset is as batches will be: named, and with cells repeated
                rows = loader.dataset.sample(skip=self.denoising.on_bad_data == "skip")
                data_rows.check_sample(split, self.tasks, rows)
                if not getattr(self._unwrapped_model.backbone, "use_pbc_single", False):
                    data_rows.check_periodicity(split, rows)

    def load_loss(self) -> None:
        super().load_loss()
        if self.self_supervised:
            self.loss_functions = []  # the placeholder has no target

    def get_dataloader(self, dataset: Any, sampler: Any, workers: int | None = None) -> Any:
        if not named(dataset):
            dataset = Numbered(dataset)
        if self.denoising.repeat_cells is not None and sampler is getattr(self, "train_sampler", None):
            dataset = RepeatedCells(dataset, self.denoising.repeat_cells, self.draw_task.seed, sampler, self._per_atom)
        for split in ("train", "val"):  # predictions are to be of every row
            if sampler is getattr(self, f"{split}_sampler", None):
                dataset = Guarded(dataset, split, self._row_check(split))
        return super().get_dataloader(dataset, sampler, workers)

    def _row_check(self, split: str) -> Callable[[Any], None]:
        backbone, batch_size = self._unwrapped_model.backbone, self.config["optim"].get("batch_size", 1)
        adapter = adapter_for(backbone)
        if split == "val":
            batch_size = self.config["optim"].get("eval_batch_size", batch_size)
        alone = "with optim.batch_size: 1 nothing else does" if batch_size == 1 else ""
        if not adapter.runs_lone_structures:
            alone = f"{adapter.names[0]} runs no structure without any"
        return partial(
            check_row,
            split=split,
            needed=data_rows.labels_needed(self.tasks, self.output_targets),
            max_num_elements=adapter.max_num_elements,
            elements_key=adapter.elements_key,
            use_pbc=getattr(backbone, "use_pbc", True),
            cutoff=getattr(backbone, "cutoff", None),
            alone=alone,
        )

    def load_extras(self) -> None:
        _mend_warmup(self.config["optim"], len(self.train_loader) if self.train_loader else None)
        super().load_extras()

    def load_checkpoint(
        self, checkpoint_path: str, checkpoint: dict[str, Any] | None = None, inference_only: bool = False
    ) -> None:
        """Load a checkpoint of this run, or start from one of another kind: plain, one-piece, or with other tasks.

        Weights are kept, added parts start fresh, and the optimiser keeps what it knows of the weights that stay.
        """
        if checkpoint is None:
            checkpoint = checkpoints.read(checkpoint_path)
        if checkpoints.is_of(checkpoint, self._unwrapped_model):
            super().load_checkpoint(checkpoint_path, checkpoint, inference_only)
        else:
            checkpoint = checkpoints.adapt(
                checkpoint,
                self._unwrapped_model,
                optimizer=None if inference_only else self.optimizer,
                ema=self.ema,
                restart=self.denoising.restart,
            )
            super().load_checkpoint(checkpoint_path, checkpoint, inference_only)
        if not inference_only and self.ema is None and self.ema_decay:
            # The host switches the average off for good when a checkpoint has none.
            self.ema = ExponentialMovingAverage(self.model.parameters(), self.ema_decay)

    def train(self, *args: Any, **kwargs: Any) -> None:
        super().train(*args, **kwargs)
        optim = self.config["optim"]
        every = optim.get("checkpoint_every", optim.get("eval_every", len(self.train_loader)))
        if every != -1 and self.step % every:
            # The host would leave the steps since the last checkpoint out of any.
            self.save(checkpoint_file="checkpoint.pt", training_state=True)
        left_out = distutils.all_reduce(self._left_out, device=self.device)
        if left_out:
            logging.warning("%d structures had nothing to denoise and were left out of the denoising loss", left_out)
        bad = distutils.all_reduce(self._bad_rows, device=self.device)
        if bad:
            logging.warning("%d times a bad row was left out, and the next good one stood in for it", bad)
        if distutils.is_master() and not self.is_debug:
            folder = self.config["cmd"]["checkpoint_dir"]
            logging.info(checkpoints.what_next(folder, pretrained=self.self_supervised))

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        with self.validating():
            return super().validate(*args, **kwargs)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """While entered, forward passes in eval mode are of validation, not prediction."""
        self._validating = True
        try:
            yield
        finally:
            self._validating = False

    @contextmanager
    def _without_open_step(self) -> Iterator[None]:
        if self._scale_before is None:
            yield
            return
        running, before = self._scale_before
        now = {key: value.clone() for key, value in running.state_dict().items()}
        running.load_state_dict(before)
        try:
            yield
        finally:
            running.load_state_dict(now)

    # --- a step ---------------------------------------------------------------------------------------------------

    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss)
        self._scale_before = None

    def _forward(self, batch: Any) -> dict[str, Tensor]:
        self._step, self._parts, self._scale_before = None, LossTerms(), None
        # Prediction never corrupts; validation does where there is nothing else to judge by.
        if self.model.training:
            self._note_bad_data(batch)
            if self.denoising.drop_path is not None:
                adapter_for(self._unwrapped_model.backbone).set_drop_path(self.denoising.drop_path.rate(self.step))
            self._step = self._begin(batch, self.draw_task(self.step), self.draw_task.seed, self.step)
        elif self._validating:
            self._note_bad_data(batch)
        if not self.model.training and self._validating and self.self_supervised:
            judge = next(task for task in self.tasks.values() if task.settings.prob)
            self._step = self._begin(batch, judge, 0, VALIDATION)
        sizes = "optim.batch_size and optim.eval_batch_size"
        with data_rows.neighbours_needed(self._unwrapped_model.backbone, partial(self._views, batch), sizes):
            if self._step is None:
                return super()._forward(batch)
            with with_plan(self.model, self._step.plan) as returned:
                out = super()._forward(batch)
        self._step.noise = returned[NOISE].float()
        return out

    def _views(self, batch: Any) -> Iterator[tuple[list[str], Any]]:
        """The batch and its parts as the model's passes saw them, with the names of their structures."""
        names = data_rows.names_of(batch)
        yield names, batch
        for run in self._step.plan.passes if self._step is not None else ():
            if run.subset is not None:
                yield [names[i] for i in run.subset.structures.tolist()], view_of(batch, run)

    def _begin(self, batch: Any, task: DenoisingTask | None, seed: int, step: int) -> Step | None:
        """Corrupt the batch for a task, all on the CPU, before anything is moved to the device."""
        if task is None:
            return None
        structures = structures_of(batch)
        corruption = task.corrupt(structures, seed=seed, step=step)
        passes = task.passes(structures, corruption, seed=seed, step=step)
        progress = self.step / max(self.config["optim"].get("max_epochs", 1) * len(self.train_loader or ()), 1)
        objective = task.objective(min(progress, 1.0))
        if objective.scale is None:
            running = self._unwrapped_model.denoising[task.name]["scale"]
            if step != VALIDATION:
                self._scale_before = running, {key: value.clone() for key, value in running.state_dict().items()}
                running.update(corruption.noise[corruption.mask], distutils.all_reduce)
            objective = replace(objective, scale=running.scale)
        return Step(
            corruption=corruption,
            plan=Plan(task.name, passes).to(self.device),
            objective=objective,
            fixed=structures.fixed,
            outputs=self.output_targets,
        )

    def _compute_loss(self, out: dict[str, Tensor], batch: Any) -> Tensor:
        step, host_functions = self._step, self.loss_functions
        if step is None and not self.model.training:
            return super()._compute_loss(out, batch)
        ranks = Ranks(distutils.get_world_size(), partial(distutils.all_reduce, device=self.device))
        if step is None or step.objective.clean:
            self.loss_functions = [RecordedLoss.of(target, info, self._parts) for target, info in host_functions]
        else:
            batch = step.trained(batch)
            self.loss_functions = step.loss_functions(host_functions, batch.natoms, ranks, self._parts)
        try:
            loss = super()._compute_loss(out, batch)
        finally:
            self.loss_functions = host_functions
        if step is not None and step.objective.loss is not None:
            loss = loss + step.noise_term(DDPLoss(step.objective.loss, reduction="mean"), ranks, self._parts)
        return loss if self._bad_row is None else loss * torch.nan

    def _compute_metrics(
        self, out: dict[str, Tensor], batch: Any, evaluator: Any, metrics: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        step, metrics = self._step, metrics or {}
        if step is None or (step.objective.clean and self.output_targets):
            metrics = super()._compute_metrics(out, batch, evaluator, metrics)
        if step is not None:
            denormalised = {name: self._denorm_preds(name, value.detach(), batch) for name, value in out.items()}
            for name, prediction, target in step.judged(denormalised, batch):
                if not self.model.training:
                    # Validation needs the same names on every rank.
                    metrics.setdefault(name, {"metric": 0.0, "total": 0, "numel": 0})
                if len(prediction):  # the host divides by the count
                    metrics = evaluator.update(name, mae({name: prediction}, {name: target}, name), metrics)
        if step is not None and step.objective.loss is not None:
            idle = int((~step.corruption.corrupted).sum())
            self._left_out += idle if self.model.training else 0
            share = {"total": idle, "numel": len(step.corruption.sigma)}
            metrics = evaluator.update("denoising_left_out", share, metrics)
        if self._parts:
            # One transfer, where the host has waited for the device already.
            for name, value in zip(self._parts, torch.stack(list(self._parts.values())).tolist(), strict=True):
                metrics = evaluator.update(name, value, metrics)
        return metrics

    # --- bad data -------------------------------------------------------------------------------------------------

    def _note_bad_data(self, batch: Any) -> None:
        """Count the rows of a batch that were left out, or see to it that the run ends.

        Where other ranks would wait for this one, it goes on to where they meet: the gradients of a step, which it
        spoils, or the end of validation.
        """
        found = [line for entry in getattr(batch, "bad_data", ()) for line in entry.splitlines()]
        if not found:
            return
        if self.denoising.on_bad_data == "skip":
            for line in found:
                logging.warning("left out: %s", line)
            self._bad_rows += len(found)
            return
        self._bad_row = found[0]
        if distutils.get_world_size() == 1:
            self._stop_on_bad_data()

    def _stop_on_bad_data(self) -> None:
        """Raise DataError where any rank has seen a bad row. All ranks call it."""
        seen = [self._bad_row]
        if distutils.get_world_size() > 1:
            seen = [None] * distutils.get_world_size()
            torch.distributed.all_gather_object(seen, self._bad_row)
        for line in seen:
            if line is not None:
                raise DataError(f"{line}. With task.denoising.on_bad_data: skip such rows are left out")

    def _after_spoilt_step(self) -> None:
        self._stop_on_bad_data()

    def _aggregate_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        self._stop_on_bad_data()
        return super()._aggregate_metrics(metrics)


def _mend_warmup(optim: dict[str, Any], steps_per_epoch: int | None) -> None:
    """Make a warm-up of zero steps mean no warm-up, in place; the host's schedulers divide by its length."""
    params = optim.get("scheduler_params") or {}
    if "warmup_epochs" in params and steps_per_epoch:
        if int(params["warmup_epochs"] * steps_per_epoch) < 1:
            logging.info("optim.scheduler_params.warmup_epochs is less than one step: no warm-up")
            # The host multiplies by the steps of an epoch and cuts to an integer: one step, at full rate.
            params.update(warmup_epochs=1.5 / steps_per_epoch, warmup_factor=1.0)
    elif optim.get("warmup_steps") == 0:
        logging.info("optim.warmup_steps is zero: no warm-up")
        optim.update(warmup_steps=1, warmup_factor=1.0)


def _with_defaults(evaluation: dict[str, Any] | None, outputs: dict[str, Any]) -> dict[str, Any]:
    """The host's default metrics for the outputs of a config that names none, and one of them to be judged by."""
    evaluation = dict(evaluation or {})
    known = "s2ef" if {"energy", "forces"} <= set(outputs) else "is2re" if "energy" in outputs else None
    if not evaluation.get("metrics") and outputs:
        evaluation["metrics"] = copy.deepcopy(Evaluator.task_metrics[known]) if known else {n: ["mae"] for n in outputs}
    if not evaluation.get("primary_metric"):
        metrics = evaluation["metrics"].items()
        # The host's own rule for their names.
        names = [fn if output in fn or output == "misc" else f"{output}_{fn}" for output, fns in metrics for fn in fns]
        preferred = (Evaluator.task_primary_metric.get(known), "forces_mae", "energy_mae", *names)
        evaluation["primary_metric"] = next(name for name in preferred if name in names)
    return evaluation


@registry.register_trainer("denoising")
class DenoisingTrainer(DenoisingMixin, OCPTrainer):
    """Where a config says `ocp`, `forces` or `energy`."""


@registry.register_trainer("equiformerv2_denoising")
class EquiformerV2DenoisingTrainer(DenoisingMixin, EquiformerV2ForcesTrainer):
    """Where a config says `equiformerv2_forces`: schedules counted in epochs."""


@registry.register_trainer("mlip_denoising")
class MLIPDenoisingTrainer(DenoisingMixin, MLIPTrainer):
    """Where a config says `mlip_trainer`, as eSEN's do: schedules counted in epochs."""
