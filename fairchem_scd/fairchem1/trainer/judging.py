"""What SCD's condition is worth, measured in validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairchem_scd.denoising.condition_judge import ConditionJudge, noisy_pass
from fairchem_scd.denoising.condition_report import ConditionReport
from fairchem_scd.denoising.plan import Plan
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.fairchem1.trainer.step_state import DenoisingStep


class JudgingMixin:
    """Judges a task's condition at the end of each validation. For a host trainer, before `StepMixin`.

    In pre-training validation itself runs the clean pass and the noisy pass that is told the right embedding. Beside
    labels it never corrupts, and these passes are made here, in a sweep over the data of their own. A last sweep has
    the passes that are told another structure's embedding, and none: see `ConditionJudge`.

    All of it happens in `_aggregate_metrics`, which the host calls once, after the last batch and before it puts the
    moving average of the weights aside and writes the log.

    Attributes:
        condition_report: of the latest validation; None: nothing was judged.
    """

    tasks: dict[str, DenoisingTask]
    self_supervised: bool

    def __init__(self, **config: Any) -> None:
        self._judge: ConditionJudge | None = None
        self.condition_report: ConditionReport | None = None
        super().__init__(**config)

    def validate(self, split: str = "val", disable_tqdm: bool = False) -> Any:
        # In pre-training `denoising_pos_mae` is of the task that validation corrupts for, and stays so.
        tasks = (self._validated_task,) if self.self_supervised else self.tasks.values()
        task = next((task for task in tasks if task.judges_condition), None)
        if task is not None:
            model = self._unwrapped_model
            self._judge = ConditionJudge(model, task, self._call, model.structures_of)
        self._judged_split = split
        try:
            return super().validate(split, disable_tqdm)
        finally:
            self._judge = None

    def _compute_metrics(
        self, out: dict[str, Tensor], batch: Any, evaluator: Any, metrics: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        judge, step = self._judge, self._step
        if judge is not None and isinstance(step, DenoisingStep) and step.task is judge.task:
            judge.note_right(batch, step.corruption, noisy_pass(step.plan.passes), step.noise, step.embedding)
        return super()._compute_metrics(out, batch, evaluator, metrics)

    def _aggregate_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        metrics = super()._aggregate_metrics(metrics)
        if self._judge is not None:
            self.condition_report = report = self._judged(self._judge)
            found = {} if report is None else report.metrics()
            metrics.update({name: {"metric": value, "total": value, "numel": 1} for name, value in found.items()})
        return metrics

    def _judged(self, judge: ConditionJudge) -> ConditionReport | None:
        loader = self.val_loader if self._judged_split == "val" else self.test_loader
        if not self.self_supervised:
            for batch in loader:
                judge.first(batch.to(self.device))
        judge.pair()
        for batch in loader:
            judge.second(batch.to(self.device))
        return judge.report()

    def _call(self, batch: Any, plan: Plan) -> Mapping[str, Tensor]:
        # Not through DDP, which would send buffers around.
        with torch.autocast("cuda", enabled=self.scaler is not None):
            return self._unwrapped_model(batch, plan)
