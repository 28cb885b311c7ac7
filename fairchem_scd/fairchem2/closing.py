"""What a run says at its end: where its files lie, and what to do with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem.core.common import distutils
from torchtnt.framework.callback import Callback

if TYPE_CHECKING:
    from torchtnt.framework.state import State


class ClosingReport(Callback):
    """Logs at the end of training where its files lie. It comes after the host's TrainCheckpointCallback in a config:

    runner:
      callbacks:
        - _target_: fairchem.core.components.callbacks.TrainCheckpointCallback
          ...
        - _target_: fairchem_scd.fairchem2.closing.ClosingReport
    """

    def __init__(self) -> None:
        self._checkpoints: Path | None = None

    def set_runner_callbacks(self, save: Callable, load: Callable, checkpoint_dir: str) -> None:
        """Called by the host before training."""
        self._checkpoints = Path(checkpoint_dir)

    def on_train_end(self, state: State, unit: Any) -> None:
        if self._checkpoints is not None and distutils.is_master():
            datasets = dict.fromkeys(name for task in unit.tasks for name in task.datasets)
            logging.info("\n".join(closing_lines(self._checkpoints / "final", [*datasets])))


def closing_lines(checkpoint: Path, datasets: Sequence[str]) -> list[str]:
    """The lines about a checkpoint that a run left.

    Args:
        checkpoint: the host's folder of it.
        datasets: names of the data sets that the run's tasks train on; none in pre-training.
    """
    plain, resume = checkpoint / "inference_ckpt.pt", checkpoint / "resume.yaml"
    if not resume.exists():
        return [
            "Training is done. It left no checkpoint: that takes a TrainCheckpointCallback with "
            "checkpoint_every_n_steps, in runner.callbacks, before this ClosingReport"
        ]
    lines = ["Training is done."]
    if plain.exists():
        lines.append(f"  plain fairchem weights: {plain}")
    lines += [f"  all, to resume from:    {checkpoint}", "Next:"]
    if plain.exists() and datasets:
        others = f" (or {', '.join(map(repr, datasets[1:]))})" if datasets[1:] else ""
        lines.append(
            f"  use it with ASE:        FAIRChemCalculator.from_model_checkpoint('{plain}', "
            f"task_name='{datasets[0]}'){others}"
        )
    if plain.exists():
        lines.append(f"  fine-tune from it:      initialize_finetuning_model, with checkpoint_location: {plain}")
    return [*lines, f"  embed structures:       fairchem-scd embed {checkpoint} CONFIG OUT.npz"]
