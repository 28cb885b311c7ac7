"""Which task a step has."""

from __future__ import annotations

from collections.abc import Mapping

from fairchem_scd.denoising.random import stream
from fairchem_scd.denoising.tasks.base import DenoisingTask

# Probabilities that sum to 1 leave no ordinary step, even where their sum is rounded to a little less.
_ROUNDING = 1e-9


class TaskDraw:
    """Draws the task of a step from (seed, step) alone: the same on every rank, and after a restart.

    Args:
        tasks: by name; their probabilities sum to at most 1.
        seed: the run's seed.
    """

    def __init__(self, tasks: Mapping[str, DenoisingTask], seed: int) -> None:
        self.tasks = tasks
        self.seed = seed

    def __call__(self, step: int) -> DenoisingTask | None:
        """The task of `step`; None for an ordinary step."""
        point = stream(self.seed, step, "task of the step").random()
        for task in self.tasks.values():
            point -= task.settings.prob
            if task.settings.prob and point < _ROUNDING:
                return task
        return None
