"""Gradients that are not finite never reach the optimiser, and the moving average takes no step with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

_PATIENCE = 100
"""Steps in a row without finite gradients after which a run ends."""


class FiniteGradients:
    """Skips the updates of an optimiser whose gradients are not finite.

    Weights, their moving average and the optimiser's own state stay as they were. The schedule of the learning rate
    goes on, as it does on fairchem 1.x: it counts the steps of the run. All ranks have the same gradients, so all do
    the same.

    Args:
        optimizer: gets a hook.

    Attributes:
        skipped: numbers of the steps whose update was skipped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.skipped: list[int] = []
        self._number: int | None = None
        self._then: Callable[[], None] | None = None
        self._patience = _PATIENCE
        optimizer.register_step_pre_hook(self._check)

    @contextmanager
    def watched(self, number: int, then: Callable[[], None], average: AveragedModel | None) -> Iterator[None]:
        """While entered, the update of step `number` is watched.

        No other is: the host makes updates without an effect to set up the optimiser's state.

        Args:
            number: of the step.
            then: is called before the update, when the device has been waited for. The update is not made if it raises.
            average: of the weights, which the host updates in every step, after the weights.
        """
        self._number, self._then = number, then
        try:
            with nullcontext() if average is None else self._held(average):
                yield
        finally:
            self._number = None

    @contextmanager
    def _held(self, average: AveragedModel) -> Iterator[None]:
        """While entered, a moving average is not updated after a step that was skipped."""
        update = average.update_parameters

        def update_unless_skipped(model: nn.Module) -> None:
            if self.skipped[-1:] != [self._number]:
                update(model)

        average.update_parameters = update_unless_skipped
        try:
            yield
        finally:
            del average.update_parameters

    def _check(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._number is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in parameters]) if parameters else ()
        finite = not norms or bool(torch.stack(norms).isfinite().all())
        self._then()
        if finite:
            self._patience = _PATIENCE
            return
        for p in parameters:
            p.grad = None
        self.skipped.append(self._number)
        logging.warning(
            "step %d: gradients that are not finite; weights, their average and optimiser stay as they were",
            self._number,
        )
        self._patience -= 1
        if not self._patience:
            raise RuntimeError(
                f"{_PATIENCE} steps in a row, up to step {self._number}, had gradients that are not finite: the run "
                "has diverged; go on from an earlier checkpoint with a lower learning rate (optimizer_fn.lr) or "
                "clip_grad_norm"
            )

    def report(self) -> None:
        """Say how many steps changed nothing."""
        if self.skipped:
            logging.warning(
                "%d steps had gradients that are not finite and changed nothing; the first was step %d",
                len(self.skipped),
                self.skipped[0],
            )
