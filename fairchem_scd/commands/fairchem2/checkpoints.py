"""Models of fairchem 2.x checkpoints: folders of training checkpoints, and inference checkpoints."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import hydra
import torch
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from fairchem.core.units.mlip_unit.mlip_unit import UNIT_RESUME_CONFIG
from fairchem.core.units.mlip_unit.utils import load_inference_model
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.errors import ConfigError, first_line
from fairchem_scd.fairchem2.model import convert
from fairchem_scd.host import missing

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds of a model.

    Attributes:
        model: config of the model, as Hydra instantiates it.
        weights: raw, by the names of a DenoisingHydra or of the host's hydra.
        average: the moving average of them; None where the run kept none.
        denoising: the denoising block of the run; None where it had none, or the checkpoint does not say.
        tasks: name and property of the host's tasks that the run trained; none in pre-training.
        plain: it is an inference checkpoint, which holds nothing of the denoising.
    """

    model: dict[str, Any]
    weights: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor] | None
    denoising: dict[str, Any] | None
    tasks: tuple[SimpleNamespace, ...]
    plain: bool

    @property
    def supervised(self) -> bool:
        """The run trained outputs."""
        return bool(self.tasks)


def read(path: str | Path) -> Stored:
    """Read a checkpoint.

    Args:
        path: the folder of a training checkpoint (`checkpoints/step_N`, `checkpoints/final`) or an inference
            checkpoint (`inference_ckpt.pt`).

    Raises:
        ConfigError: it is neither.
        FileNotFoundError: there is nothing at the path.
    """
    path = Path(path)
    if path.is_dir():
        return _training(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=False)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: not a checkpoint of fairchem 2.x ({first_line(error)})") from error
    if not isinstance(stored, MLIPInferenceCheckpoint):
        if isinstance(stored, dict) and "state_dict" in stored:
            raise ConfigError(missing(f"{path}", 1))
        raise ConfigError(f"{path}: not a checkpoint of fairchem 2.x: it holds a {type(stored).__name__}")
    load_inference_model(None, preloaded_checkpoint=stored)  # mends the configs of the first UMA models in place
    return Stored(
        model=_container(stored.model_config),
        weights=stored.model_state_dict,
        average=_average(stored.ema_state_dict),
        denoising=None,
        tasks=_trained(stored.tasks_config),
        plain=True,
    )


def _training(folder: Path) -> Stored:
    resume = folder / UNIT_RESUME_CONFIG
    if not resume.is_file() or not (folder / ".metadata").is_file():
        raise ConfigError(
            f"{folder}: not a training checkpoint of fairchem 2.x, which holds {UNIT_RESUME_CONFIG} and .metadata; the "
            "checkpoints of a run are below its folder, such as runs/NAME/checkpoints/final"
        )
    unit = OmegaConf.load(resume).runner.train_eval_unit
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "state.pt"
        dcp_to_torch_save(folder, whole)
        state = torch.load(whole, map_location="cpu", weights_only=False)["unit_state"]
    return Stored(
        model=_container(unit.model),
        weights=state["model"],
        average=_average(state.get("ema")),
        denoising=_container(unit.denoising) if unit.get("denoising") is not None else None,
        tasks=_trained(unit.tasks),
        plain=False,
    )


def build(stored: Stored, weights: Weights | None = None) -> nn.Module:
    """The model of a checkpoint as a DenoisingHydra, in eval mode and without gradients.

    Args:
        stored: from `read`.
        weights: "ema", "raw", or None: the average where there is one.

    Raises:
        ConfigError: the backbone has no adapter, the average is asked for and there is none, or the weights are not
            those of the config.
    """
    if weights == "ema" and stored.average is None:
        raise ConfigError("--weights ema: the checkpoint has no moving average; its run had ema_decay: null")
    values = stored.weights if weights == "raw" or stored.average is None else stored.average
    model = hydra.utils.instantiate(stored.model)
    tasks, _ = build_tasks(stored.denoising, stored.supervised)
    convert(model, tasks)
    try:
        model.load_state_dict(values)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint's weights are not those of its config: {error}") from error
    return model.requires_grad_(False).eval()


def _container(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def _trained(tasks: Any) -> tuple[SimpleNamespace, ...]:
    found = [task for task in _container(tasks) or () if not task.get("inference_only")]
    return tuple(SimpleNamespace(name=task["name"], property=task["property"]) for task in found)


def _average(stored: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """The moving average under the names of the model itself."""
    if not stored:
        return None
    return {name.removeprefix("module."): value for name, value in stored.items() if name != "n_averaged"}
