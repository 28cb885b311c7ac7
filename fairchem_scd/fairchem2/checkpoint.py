"""The files of a run: an inference checkpoint without a trace of this package, and states of other units."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from fairchem.core.units.mlip_unit.mlip_unit import UNIT_INFERENCE_CHECKPOINT, UNIT_RESUME_CONFIG
from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fairchem_scd.errors import ConfigError

_ADDED = re.compile(r"(?:^|\.)denoising\.")
"""What the name of a weight has that this package added."""


def write_plain(folder: Path) -> None:
    """Write the inference checkpoint of a training checkpoint, as the host would for the plain model.

    The host's own function would store all weights, so that the host could not load the file, and would lose
    `heads: {}` of pre-training, so that fine-tuning could not start from it: its format for training checkpoints has no
    empty containers. The file is written under another name and then renamed.

    Args:
        folder: of the training checkpoint, which the host has written.
    """
    path = folder / UNIT_INFERENCE_CHECKPOINT
    part = path.with_suffix(".part")
    dcp_to_torch_save(folder, part)
    state = torch.load(part, map_location="cpu", weights_only=False)["unit_state"]
    unit = OmegaConf.load(folder / UNIT_RESUME_CONFIG).runner.train_eval_unit
    plain = MLIPInferenceCheckpoint(
        model_config=OmegaConf.to_container(unit.model, resolve=True),
        model_state_dict=_without_added(state["model"]),
        ema_state_dict=_without_added(state["ema"]),
        tasks_config=OmegaConf.to_container(unit.tasks, resolve=True),
    )
    torch.save(plain, part)
    part.replace(path)


def missing_keys(folder: str, wanted: Mapping[str, Any]) -> set[str]:
    """Keys of a unit's state that a training checkpoint does not have, as it flattens them.

    Args:
        folder: of the checkpoint.
        wanted: the state of the unit.
    """
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    flat, _ = flatten_state_dict({"unit_state": dict(wanted)})
    return set(flat) - set(stored)


def load_known(folder: str, state: dict[str, Any]) -> dict[str, Any]:
    """A unit's state with all of it that a training checkpoint has, and the rest as it is."""
    whole = {"unit_state": state}
    dcp.load(whole, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    return whole["unit_state"]


def check_only_added(folder: str, keys: Collection[str]) -> None:
    """Raise ConfigError unless all keys that a training checkpoint lacks are of what this package adds."""
    others = sorted(key for key in keys if not _ADDED.search(key))
    if others:
        raise ConfigError(
            f"{folder}: of another model: it has no {', '.join(others[:3])}{' …' if len(others) > 3 else ''}; to start "
            "from its weights alone, use its inference checkpoint and initialize_finetuning_model"
        )


def lacks(missing: Collection[str], name: str) -> bool:
    """Whether a model's weight is among the `missing_keys` of a training checkpoint."""
    return f"unit_state.model.{name}" in missing


def _without_added(weights: dict[str, Any] | None) -> dict[str, Any] | None:
    return weights and {name: value for name, value in weights.items() if not _ADDED.search(name)}
