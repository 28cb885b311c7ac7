"""A few steps of each kind, taken as the host takes them: do they work, and what do they cost?"""

from __future__ import annotations

import time
from typing import Any

import torch

from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.check.rounds import AlwaysDrawn, say_idle, take_rounds
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.errors import ConfigError


def try_steps(trainer: Any, report: Report, *, repeats: int, seconds: float) -> None:
    """Take steps of each kind in turn and report what they cost.

    Args:
        trainer: of this package, in debug mode. Its weights change.
        report: gets the lines.
        repeats: timed rounds, after a first round that is not timed.
        seconds: begin no further round after this time.
    """
    batch = next(iter(trainer.train_loader))
    take_rounds(
        trainer.tasks,
        lambda name, task: _step(trainer, batch, name, task, report),
        report,
        ordinary=not trainer.self_supervised,
        repeats=repeats,
        seconds=seconds,
        batch=len(batch.natoms),
        steps_per_epoch=len(trainer.train_loader),
        device=trainer.device.type,
    )


def _step(trainer: Any, batch: Any, name: str, task: DenoisingTask | None, report: Report) -> tuple[float, int]:
    """One step as in the host's training loop. Returns seconds and peak bytes on the device."""
    trainer.draw_task = AlwaysDrawn(task, trainer.draw_task.seed)
    trainer.model.train()
    trainer.step += 1
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast("cuda", enabled=trainer.scaler is not None):
        out = trainer._forward(batch)
        loss = trainer._compute_loss(out, batch)
    trainer._compute_metrics(out, batch, trainer.evaluator, {})
    trainer._backward(trainer.scaler.scale(loss) if trainer.scaler else loss)
    if on_gpu:
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    if not trainer.finite and not trainer.scaler:  # with a scaler, gradients of the first steps often overflow
        raise ConfigError(f"the loss is {float(loss):g}, or its gradients are not finite")
    if not trainer.finite:
        return took, torch.cuda.max_memory_allocated()
    without = [n for n, p in trainer._unwrapped_model.named_parameters() if p.requires_grad and p.grad is None]
    say_idle(name, without, report)
    return took, torch.cuda.max_memory_allocated() if on_gpu else 0


def try_validation(trainer: Any, report: Report) -> None:
    """Validate on one batch, and check that this gives the metric that the best checkpoint is chosen by."""
    if trainer.val_loader is None:
        return
    batch, metrics = next(iter(trainer.val_loader)), {}
    trainer.model.eval()
    with trainer.validating():
        with torch.autocast("cuda", enabled=trainer.scaler is not None):
            out = trainer._forward(batch)
        trainer._compute_loss(out, batch)
        metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
    primary = trainer.evaluation_metrics.get("primary_metric")
    if primary not in metrics:
        report.problem(
            f"evaluation_metrics.primary_metric: '{primary}' is not among what validation gives: "
            f"{', '.join(sorted(metrics))}"
        )
    report.say("validation", f"works, with batches of {len(batch.natoms)}; the best checkpoint follows {primary}")
