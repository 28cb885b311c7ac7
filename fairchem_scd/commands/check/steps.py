"""A few steps of each kind, taken as the host takes them: do they work, and what do they cost?"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

from fairchem_scd.commands.check.costs import say_costs
from fairchem_scd.commands.check.report import Report
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.errors import ConfigError


class _Always:
    """Takes the place of a TaskDraw: every step has the same task."""

    def __init__(self, task: DenoisingTask | None, seed: int) -> None:
        self.task, self.seed = task, seed

    def __call__(self, step: int) -> DenoisingTask | None:
        return self.task


def describe_model(trainer: Any, report: Report) -> None:
    """Report the number of parameters of each part of the model."""
    model = trainer._unwrapped_model
    parts = {"backbone": model.backbone, **{f"head {name}": head for name, head in model.output_heads.items()}}
    counts = [f"{name} {_count(part)}" for name, part in parts.items()]
    report.say("parameters", ", ".join(counts))
    for name, modules in getattr(model, "denoising", {}).items():
        added = ", ".join(f"{part.replace('_', ' ')} {_count(module)}" for part, module in modules.items())
        report.say("", f"added by {name}, for training alone: {added}")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if frozen:
        report.say("", f"of these {frozen:,} are frozen")


def _count(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"


def try_steps(trainer: Any, report: Report, *, repeats: int, seconds: float) -> None:
    """Take steps of each kind in turn and report what they cost.

    Args:
        trainer: of this package, in debug mode. Its weights change.
        report: gets the lines.
        repeats: timed rounds, after a first round that is not timed.
        seconds: begin no further round after this time.
    """
    kinds: dict[str, DenoisingTask | None] = {} if trainer.self_supervised else {"ordinary": None}
    kinds |= {name: task for name, task in trainer.tasks.items() if task.settings.prob}
    batch, start = next(iter(trainer.train_loader)), time.monotonic()
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    memory: dict[str, int] = {}
    for turn in tqdm(range(1 + repeats), desc="rounds of steps", leave=False):
        if turn > 1 and time.monotonic() - start > seconds:
            break
        for name, task in kinds.items():
            with report.part(f"a step of kind '{name}'"):
                took, peak = _step(trainer, batch, name, task, report)
                memory[name] = max(peak, memory.get(name, 0))
                if turn:
                    taken[name].append(took)
        if any(not taken[name] for name in kinds) and turn:
            return  # a kind of step does not work, and costs cannot be compared
    times = {name: statistics.median(values) for name, values in taken.items() if values}
    if times:
        say_costs(
            times,
            memory,
            {name: trainer.tasks[name].settings.prob for name in times if name != "ordinary"},
            batch=len(batch.natoms),
            rounds=min(len(values) for values in taken.values()),
            steps_per_epoch=len(trainer.train_loader),
            device=trainer.device.type,
            report=report,
        )


def _step(trainer: Any, batch: Any, name: str, task: DenoisingTask | None, report: Report) -> tuple[float, int]:
    """One step as in the host's training loop. Returns seconds and peak bytes on the device."""
    trainer.draw_task = _Always(task, trainer.draw_task.seed)
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
    if without:
        report.problem(
            f"{len(without)} parameters have no gradient in a step of kind '{name}', such as {without[0]}: distributed "
            "training would wait for them"
        )
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
