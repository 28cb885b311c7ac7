"""Training that may stop anywhere and go on as if it had not stopped.

- A step's random numbers (dropout, drop path, edge frames) come from (seed, step, rank). So no random state has to be
  stored, and validation between two steps does not change the second.
- A checkpoint holds the state after a complete step, also where preemption asks for one inside a step or in validation.
- A checkpoint file is complete: it is written under another name, flushed to disk, then renamed. A run ends with one.
- A resumed run has the right learning rate. The host writes checkpoints before the schedule's step, so one is made up.
- The host writes the checkpoint of a step before it validates. If the run stopped in between, the resumed run begins
  with that validation, since the best metric depends on it.
- A warning says what it means where the number of ranks or the batch size is not the checkpoint's.
- Gradients that are not finite never reach the optimiser.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from torch import Tensor

from fairchem_scd.denoising.random import stream

_PATIENCE = 100
"""Steps in a row without finite gradients after which a run ends."""


class ResumableMixin:
    """Put before a host trainer among the bases.

    Attributes:
        finite: whether the latest step's gradients were finite; otherwise the step changed nothing.
    """

    def __init__(self, **config: Any) -> None:
        self._whole_steps = 0  # number of the last step whose update is complete
        self._averaged = False  # the moving average may stand in for the weights
        self._not_finite: list[int] = []  # steps whose gradients were not
        self._patience = _PATIENCE  # how many more of them in a row before the run ends
        self.finite = True
        super().__init__(**config)
        # For who goes on: the ranks of this run, and the last step that was validated. Checkpoints store `cmd`.
        self.config["cmd"].update(world_size=distutils.get_world_size(), validated=0)

    # --- the state of a run ---------------------------------------------------------------------------------------

    def load_checkpoint(
        self, checkpoint_path: str, checkpoint: dict[str, Any] | None = None, inference_only: bool = False
    ) -> None:
        if checkpoint is None:
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=False)
        super().load_checkpoint(checkpoint_path, checkpoint, inference_only)
        self._whole_steps = self.step
        if self.ema:
            self.ema.collected_params = []
        if not inference_only:
            # Checkpoints of the host's own trainers do not say it; they count as validated.
            self.config["cmd"]["validated"] = _cmd(checkpoint).get("validated", self.step)
            if self.step and self.train_loader is not None:
                self._say_what_changes(checkpoint)
        scheduler = getattr(self, "scheduler", None)
        if inference_only or scheduler is None or scheduler.scheduler_type in ("Null", "ReduceLROnPlateau"):
            return
        if getattr(scheduler.scheduler, "last_epoch", None) == self.step - 1:
            scheduler.step()  # the one that the host makes after it has written the checkpoint

    def _say_what_changes(self, checkpoint: dict[str, Any]) -> None:
        """Warn where a step of this run is not a step of the checkpoint's."""
        optim, config = self.config["optim"], checkpoint.get("config") or {}
        now = (distutils.get_world_size(), optim.get("batch_size", 1))
        then = (
            _cmd(checkpoint).get("world_size") or config.get("gpus") or now[0],
            (config.get("optim") or optim).get("batch_size", 1),
        )
        if now == then or not distutils.is_master():
            return
        size, before, length = now[0] * now[1], then[0] * then[1], len(self.train_loader)
        text = (
            f"the checkpoint is of {then[0]} rank(s) × optim.batch_size {then[1]} = {before} structures a step; this "
            f"run has {now[0]} × {now[1]} = {size}. "
        )
        if size == before:
            text += "Steps stay what they were, but for dropout, drop path and random edge frames"
        else:
            left = optim["max_epochs"] * length - self.step
            same = f"optim.batch_size: {before // now[0]}" if before % now[0] == 0 else f"a product of {before}"
            text += (
                f"An epoch has {length} steps now, so step {self.step} counts as epoch {self.step / length:.4g} "
                f"(it was {checkpoint.get('epoch', 0):.4g}) of {optim['max_epochs']}: "
                + (f"{left} steps are left. " if left > 0 else "the run is over; raise optim.max_epochs to go on. ")
                + "Steps are what the learning-rate schedule (with the lengths it has in the checkpoint), the moving "
                f"average, eval_every and checkpoint_every count. As before it would be with {same}"
            )
        logging.warning(text)

    def _make_up_for_validation(self, disable_tqdm: bool) -> None:
        """Validate the checkpoint's step, if it was to be validated and the run stopped before that was done."""
        optim = self.config["optim"]
        every = optim.get("eval_every", len(self.train_loader))
        validated = self.config["cmd"]["validated"] == self.step
        metric = self.evaluation_metrics.get("primary_metric")
        if not self.step or self.step % every or validated or not self.val_loader or self.primary_metric != metric:
            return
        metrics = self.validate(split="val", disable_tqdm=disable_tqdm)
        self.update_best(metric, metrics, disable_eval_tqdm=disable_tqdm)
        if self.scheduler.scheduler_type == "ReduceLROnPlateau":
            self.scheduler.step(metrics=metrics[metric]["metric"])

    def update_best(self, *args: Any, **kwargs: Any) -> None:
        super().update_best(*args, **kwargs)
        self.config["cmd"]["validated"] = self.step

    def save(
        self, metrics: Any = None, checkpoint_file: str = "checkpoint.pt", training_state: bool = True
    ) -> str | None:
        """Write a checkpoint of the state after the last complete step, as a complete file or not at all.

        Raises:
            OSError: it could not be written; the checkpoint before it is still there.
        """
        if self.is_debug or not distutils.is_master():
            return super().save(metrics, checkpoint_file, training_state)
        folder = Path(self.config["cmd"]["checkpoint_dir"])
        part = folder / f"{_part_prefix(checkpoint_file)}{os.getpid()}"
        try:
            # A signal's handler may store a checkpoint under the same name and end the process: it waits for this one.
            with _deferred_signals(), self._after_whole_step() if training_state else self._averaging():
                super().save(metrics, part.name, training_state)
                _to_disk(part)
                part.replace(folder / checkpoint_file)
                _to_disk(folder)
        except (OSError, RuntimeError) as error:  # torch.save raises either
            part.unlink(missing_ok=True)
            raise OSError(
                f"{folder / checkpoint_file} could not be written ({error}); the one before is whole"
            ) from error
        return str(folder / checkpoint_file)

    @contextmanager
    def _after_whole_step(self) -> Iterator[None]:
        """While entered, the trainer's state is that after the last complete step, wherever in a step it is now."""
        step, epoch = self.step, self.epoch
        swapped = self._averaged and bool(self.ema and self.ema.collected_params)
        if swapped:
            self.ema.restore()
        if self._whole_steps != step:
            self.step = self._whole_steps
            self.epoch = self._whole_steps / max(len(self.train_loader or ()), 1)
        try:
            with self._without_open_step() if self._whole_steps != step else nullcontext():
                yield
        finally:
            self.step, self.epoch = step, epoch
            if swapped:
                self.ema.copy_to()

    @contextmanager
    def _without_open_step(self) -> Iterator[None]:
        """While entered, the model's buffers are as before the step under way. For subclasses that change buffers."""
        yield

    @contextmanager
    def _averaging(self) -> Iterator[None]:
        """While entered, the moving average may stand in for the weights, and `_after_whole_step` puts them back."""
        outer, self._averaged = self._averaged, True
        try:
            yield
        finally:
            self._averaged = outer
            if self.ema and not outer:
                # The weights that the host put aside. It keeps them, and the next time they would be the wrong ones.
                self.ema.collected_params = []

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        self._seed("validation")
        with self._averaging():
            return super().validate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._averaging():
            return super().predict(*args, **kwargs)

    def run_relaxations(self, *args: Any, **kwargs: Any) -> Any:
        with self._averaging():
            return super().run_relaxations(*args, **kwargs)

    # --- a step ---------------------------------------------------------------------------------------------------

    def _forward(self, batch: Any) -> dict[str, Tensor]:
        if self.model.training:
            self._seed("random numbers")
        return super()._forward(batch)

    def _seed(self, what: str) -> None:
        key = stream(self.config["cmd"]["seed"] or 0, self.step, f"{what} of rank {distutils.get_rank()}")
        torch.manual_seed(int(key.integers(2**63)))

    def load_optimizer(self) -> None:
        super().load_optimizer()
        self.optimizer.register_step_pre_hook(self._keep_finite)

    def _backward(self, loss: Tensor) -> None:
        self.finite = False
        with _deferred_signals():  # so that a checkpoint never holds half an update
            super()._backward(loss)
            self._whole_steps = self.step

    def _keep_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Remove gradients that are not finite: without any, the optimiser changes neither weights nor its own state.

        All ranks have the same gradients, so all do the same. A GradScaler skips such steps by itself, and often at the
        start, so with one nothing is counted here.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in parameters]) if parameters and not self.scaler else ()
        if not norms or bool(torch.stack(norms).isfinite().all()):  # the norms that clip_grad_norm_ takes
            self.finite, self._patience = True, _PATIENCE
            return
        for p in parameters:
            p.grad = None
        self._not_finite.append(self.step)
        logging.warning("step %d: gradients that are not finite; weights and optimiser stay as they were", self.step)
        self._patience -= 1
        if not self._patience:
            raise RuntimeError(
                f"{_PATIENCE} steps in a row, up to step {self.step}, had gradients that are not finite: the run has "
                "diverged; go on from an earlier checkpoint with a lower optim.lr_initial or clip_grad_norm"
            )

    def train(self, disable_eval_tqdm: bool = False) -> None:
        if distutils.is_master() and not self.is_debug:
            # What processes that were killed left behind. No other process writes here.
            for name in ("checkpoint.pt", "best_checkpoint.pt"):
                for part in Path(self.config["cmd"]["checkpoint_dir"]).glob(f"{_part_prefix(name)}*"):
                    part.unlink()
        self._make_up_for_validation(disable_eval_tqdm)
        super().train(disable_eval_tqdm)
        if self._not_finite:
            logging.warning(
                "%d steps had gradients that are not finite and changed nothing; the first was step %d",
                len(self._not_finite),
                self._not_finite[0],
            )
        optim = self.config["optim"]
        every = optim.get("checkpoint_every", optim.get("eval_every", len(self.train_loader)))
        if every != -1 and self.step % every:
            # The host would store none of the steps since its last checkpoint.
            self.save(checkpoint_file="checkpoint.pt", training_state=True)


def _cmd(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return (checkpoint.get("config") or {}).get("cmd") or {}


def _part_prefix(name: str) -> str:
    return f".{name}.part-"


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGHUP", "SIGCONT") if hasattr(signal, name)
)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """While entered, Python's handlers of preemption signals wait; they run at the end."""
    if threading.current_thread() is not threading.main_thread():  # whose handlers they are
        yield
        return
    waiting: list[int] = []
    handlers = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda received, frame: waiting.append(received))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(waiting):
        handlers[number](number, None)
