"""What tests do with a trainer: one step, a stop, and what is left of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def batch_of(trainer: Any) -> Any:
    """The first batch of its training data."""
    return next(iter(trainer.train_loader))


def step_of(trainer: Any, batch: Any, step: int = 1) -> tuple[dict[str, Any], torch.Tensor]:
    """Outputs and loss of one training step, as the host's loop makes them."""
    trainer.model.train()
    trainer.step = step
    out = trainer._forward(batch)
    return out, trainer._compute_loss(out, batch)


def folder_of(trainer: Any) -> Path:
    """Where its checkpoints are."""
    return Path(trainer.config["cmd"]["checkpoint_dir"])


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights and buffers of its model, by their names without DDP's prefix."""
    return {key: value.clone() for key, value in trainer._unwrapped_model.state_dict().items()}


def state_of(trainer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """All that goes into the next step: weights, buffers, average, optimiser, learning rate; the best metric."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {
        "model": dict(trainer.model.state_dict()),
        "average": dict(enumerate(trainer.ema.shadow_params)) if trainer.ema else {},
        "optimizer": {
            f"{names[id(p)]}.{key}": torch.as_tensor(value)
            for p, values in trainer.optimizer.state.items()
            for key, value in values.items()
        },
        "rate": {str(i): torch.tensor(g["lr"]) for i, g in enumerate(trainer.optimizer.param_groups)},
        "best": {"metric": torch.tensor(trainer.best_val_metric, dtype=torch.float64)},
    }


def assert_same(state: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    """Whether two results of `state_of` are the same to the last bit."""
    for part, values in expected.items():
        assert state[part].keys() == values.keys()
        for key, value in values.items():
            assert torch.equal(state[part][key], value), f"{part}: {key}"


class StoppedError(Exception):
    """Ends a run in a test."""


def stopped_at(trainer: Any, step: int) -> None:
    """Let a trainer run until it has drawn a step's batch."""
    forward = trainer._forward

    def interrupted(batch: Any) -> Any:
        if trainer.step == step and trainer.model.training:
            raise StoppedError
        return forward(batch)

    trainer._forward = interrupted
    with pytest.raises(StoppedError):
        trainer.train(disable_eval_tqdm=True)
