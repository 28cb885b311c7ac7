"""How often the CPU waits for the device in a step, against what docs/scaling.md says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fairchem_scd

PACKAGE = str(Path(fairchem_scd.__file__).parent)


def assert_few_waits(trainer: Any, batch: Callable[[], Any], waits: list[str]) -> None:
    """Check a denoising step against an ordinary one of the same trainer.

    Args:
        trainer: one whose task is drawn in some steps.
        batch: makes a batch.
        waits: grows by the file's name, wherever the CPU waits for the device.
    """
    numbers = range(1, 100)
    ordinary = next(n for n in numbers if trainer.draw_task(n) is None)
    drawn = next(n for n in numbers if trainer.draw_task(n) is not None)
    _waits_of(trainer, batch(), drawn, waits)  # models store things in their first pass
    plain, denoising = (_waits_of(trainer, batch(), number, waits) for number in (ordinary, drawn))
    # Each pass makes a graph and runs the backbone, and the noise has a head. The log has one error or more.
    assert denoising["forward"] <= denoising["passes"] * plain["forward"] + denoising["noise head"]
    assert denoising["rest"] <= plain["rest"] + 2 * denoising["errors"]
    assert denoising["own"] == plain["own"] == ["step.py"]


def _waits_of(trainer: Any, batch: Any, number: int, waits: list[str]) -> dict[str, Any]:
    """How often the CPU waited in a step up to its backward: in the forward, in its noise head, and after it."""
    model, marks = trainer._unwrapped_model, []
    heads = [added["noise_head"] for added in model.denoising.values()]
    hooks = [head.register_forward_pre_hook(lambda *_: marks.append(len(waits))) for head in heads]
    hooks += [head.register_forward_hook(lambda *_: marks.append(len(waits))) for head in heads]
    model.train()
    trainer.step = number
    waits.clear()
    out = trainer._forward(batch)
    forward = len(waits)
    loss = trainer._compute_loss(out, batch)
    metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
    total, plan = len(waits), getattr(trainer._step, "plan", None)
    own = [Path(name).name for name in waits if name.startswith(PACKAGE)]
    loss.backward()
    trainer._step = None
    for hook in hooks:
        hook.remove()
    return {
        "forward": forward,
        "rest": total - forward,
        "noise head": marks[1] - marks[0] if marks else 0,
        "passes": len(plan.passes) if plan is not None else 1,
        "errors": sum(name.startswith("denoising_") and name.endswith("_mae") for name in metrics),
        "own": own,
    }
