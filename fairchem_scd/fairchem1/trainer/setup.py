"""What happens before the first step: the config read, the model and the data checked, a checkpoint loaded."""

from __future__ import annotations

import copy
import logging
from typing import Any

from fairchem.core.common import distutils
from fairchem.core.modules.evaluator import Evaluator
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage
from torch.nn.parallel import DistributedDataParallel

from fairchem_scd.denoising.data_faults import DataFaults
from fairchem_scd.denoising.quiet_heads import quieten, say_which
from fairchem_scd.denoising.tasks import TaskDraw
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1 import checkpoint as checkpoints
from fairchem_scd.fairchem1.backbones import adapter_for
from fairchem_scd.fairchem1.config import check_outputs, read
from fairchem_scd.fairchem1.data import rows as data_rows
from fairchem_scd.fairchem1.data.cell_repeats import RepeatedCells
from fairchem_scd.fairchem1.data.cell_repeats import check_outputs as check_repeatable
from fairchem_scd.fairchem1.data.guarded import Guarded
from fairchem_scd.fairchem1.data.numbered import Numbered, named, repeated_name, told_apart
from fairchem_scd.fairchem1.data.sources import check_source
from fairchem_scd.fairchem1.hydra import freeze
from fairchem_scd.fairchem1.trainer.row_check import row_check


class SetupMixin:
    """Sets up a host trainer with denoising tasks.

    On construction the host calls `load_task`, `load_model`, `load_datasets`, `load_loss` and `load_extras`, in this
    order and in between things of its own, and later `load_checkpoint`, if there is one.

    Attributes:
        tasks: the denoising tasks, by name.
        denoising: the parsed `task.denoising` block.
        self_supervised: the config trains no outputs.
        draw_task: which task a step has.
        data_faults: the bad rows that the run has met.

    Raises:
        ConfigError: on construction, where the config or a sample of the data rules out what it asks for.
    """

    def __init__(self, **config: Any) -> None:
        if config.get("gp_gpus"):
            raise ConfigError("--gp-gpus: denoising does not run with graph parallelism; leave it out")
        setup = read({**config, "optim": config["optimizer"]})
        self.tasks, self.denoising, self.self_supervised = setup.tasks, setup.settings, setup.self_supervised
        if not self.tasks:
            logging.warning(self.denoising.without_tasks)
        self.data_faults = DataFaults(skip=self.denoising.on_bad_data == "skip")
        self._inference_only = config.get("inference_only", False)
        super().__init__(**setup.host_arguments(config))

    def load_task(self) -> None:
        """Fill in metrics the host has no defaults for under a dotted trainer's name; check outputs and data paths."""
        self.config["evaluation_metrics"] = _with_default_metrics(
            self.config.get("evaluation_metrics"), self.config["outputs"]
        )
        super().load_task()
        check_outputs(self.tasks, self.output_targets, self.config["loss_functions"])
        if self.denoising.repeat_cells is not None:
            self._per_atom = check_repeatable(self.output_targets)
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
        self._quieten_heads(start)
        if self.denoising.drop_path is not None:
            adapter_for(model.backbone).set_drop_path(self.denoising.drop_path.start)
        self._set_drop_path_per(self.denoising.drop_path_per or ("atom" if self.self_supervised else "structure"))
        if self.self_supervised:
            freeze(model)
            if distutils.initialized():
                # DDP would wait for the gradients of what was frozen after it had wrapped the model.
                self.model = DistributedDataParallel(model)

    def _set_drop_path_per(self, per: str) -> None:
        """Let drop path draw for each "structure" or "atom", and say so in checkpoints, for who goes on from them."""
        drops = adapter_for(self._unwrapped_model.backbone).set_drop_path_per(per)
        self.config["cmd"]["drop_path_per"] = per
        if self.denoising.drop_path_per is not None and not drops:
            logging.warning(
                "task.denoising.drop_path_per: no effect, since no block of the backbone has a drop path; where there "
                "can be one, model.backbone.drop_path_rate or task.denoising.drop_path says its rate"
            )

    def _quieten_heads(self, start: str | None) -> None:
        """Let new heads start quietly, as `quiet_heads` says. A checkpoint that is loaded later has its own heads.

        Args:
            start: the checkpoint that the model starts from, if any.
        """
        block, asked = self.config["model"], self.denoising.quiet_heads
        from_start = bool(start) and block.get("backbone") is None
        if asked is None:
            asked = from_start and bool(self.tasks)
        if not asked or not self.output_targets or (start and block.get("heads") is None):
            return
        model = self._unwrapped_model
        fresh = not from_start or checkpoints.StoredRun.read(start).is_pretrained
        quiet = quieten(model.output_heads, adapter_for(model.backbone), readout=fresh)
        say_which(quiet, model.output_heads, place="model.heads", asked=bool(self.denoising.quiet_heads))

    def load_datasets(self) -> None:
        """Load the host's datasets and check a sample of the data."""
        super().load_datasets()
        for split in ("train", "val") if self.self_supervised else ("train",):
            loader = getattr(self, f"{split}_loader")
            if loader is not None:
                # The loader's dataset has rows as batches will have them: with names, and with cells repeated.
                rows = loader.dataset.sample(skip=self.data_faults.skip)
                data_rows.check_sample(split, self.tasks, rows)
                if not getattr(self._unwrapped_model.backbone, "use_pbc_single", False):
                    data_rows.check_periodicity(split, rows)

    def load_loss(self) -> None:
        super().load_loss()
        if self.self_supervised:
            self.loss_functions = []  # the placeholder has no target

    def get_dataloader(self, dataset: Any, sampler: Any, workers: int | None = None) -> Any:
        # Of other data predictions are made, and those are to be of every row, without noise.
        split = next((name for name in ("train", "val") if sampler is getattr(self, f"{name}_sampler", None)), None)
        judged = any(task.judges_condition for task in self.tasks.values())
        changed = split == "train" or (split == "val" and (self.self_supervised or judged))
        if not named(dataset):
            dataset = Numbered(dataset)
        elif changed and (self.tasks or self.denoising.repeat_cells is not None):
            dataset = _said_apart(dataset, split)
        if self.denoising.repeat_cells is not None and split == "train":
            dataset = RepeatedCells(dataset, self.denoising.repeat_cells, self.draw_task.seed, sampler, self._per_atom)
        if split is not None:
            needed = data_rows.labels_needed(self.tasks, self.output_targets)
            check = row_check(split, needed, adapter_for(self._unwrapped_model.backbone), self.config["optim"])
            dataset = Guarded(dataset, split, check)
        return super().get_dataloader(dataset, sampler, workers)

    def load_extras(self) -> None:
        _mend_warmup(self.config["optim"], len(self.train_loader) if self.train_loader else None)
        super().load_extras()

    def load_checkpoint(
        self, checkpoint_path: str, checkpoint: dict[str, Any] | None = None, inference_only: bool = False
    ) -> None:
        """Load a checkpoint of this run, or start from one of another kind: plain, legacy, or with other tasks.

        Weights are kept, added parts start fresh, and the optimiser keeps what it knows of the weights that stay.
        """
        if checkpoint is None:
            checkpoint = checkpoints.read(checkpoint_path)
        if not checkpoints.is_of(checkpoint, self._unwrapped_model):
            checkpoint = checkpoints.adapt(
                checkpoint,
                self._unwrapped_model,
                optimizer=None if inference_only else self.optimizer,
                ema=self.ema,
                restart=self.denoising.restart,
            )
        elif not inference_only:
            checkpoint = checkpoints.regrouped(checkpoint, self._unwrapped_model, self.optimizer)
        if not inference_only and self.denoising.drop_path_per is None:
            # As the run had it so far. Checkpoints that do not say it are older than the choice.
            self._set_drop_path_per((checkpoint["config"].get("cmd") or {}).get("drop_path_per", "structure"))
        super().load_checkpoint(checkpoint_path, checkpoint, inference_only)
        if not inference_only and self.ema is None and self.ema_decay:
            # The host switches the average off for good when a checkpoint has none.
            self.ema = ExponentialMovingAverage(self.model.parameters(), self.ema_decay)


def _said_apart(dataset: Any, split: str) -> Any:
    """What `told_apart` makes of a host dataset, with a warning where rows share a name."""
    repeated = repeated_name(dataset)
    if repeated is not None and distutils.is_master():
        name, first, second = repeated
        logging.warning(
            "dataset.%s: rows %d and %d have the same name (sid/fid %s). Each row's number joins its name, so that no "
            "two rows get the same noise",
            split, first, second, name,
        )  # fmt: skip
    return told_apart(dataset, repeated)


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


def _with_default_metrics(evaluation: dict[str, Any] | None, outputs: dict[str, Any]) -> dict[str, Any]:
    """The block `evaluation_metrics`, with the host's default metrics where it names none, and one to be judged by."""
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
