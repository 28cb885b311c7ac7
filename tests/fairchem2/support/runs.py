"""Runs of the host's command in this process."""

from __future__ import annotations

import copy
import logging
import signal
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fairchem.core.launchers.slurm_launch as launch
import hydra
import torch
import yaml
from fairchem.core._cli import main
from fairchem.core.common import distutils
from fairchem.core.units.mlip_unit.mlip_unit import UNIT_INFERENCE_CHECKPOINT, MLIPTrainEvalUnit
from omegaconf import OmegaConf
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: where the host put it.
        lines: what was logged: the host's dictionaries as such, all else as text.
        unit: that trained.
    """

    folder: Path
    lines: list[Any] = field(default_factory=list)
    unit: MLIPTrainEvalUnit | None = None

    def logged(self, name: str) -> list[float]:
        """All values of a metric, in order."""
        return [line[name] for line in self.lines if isinstance(line, dict) and name in line]

    def checkpoint(self, name: str = "final") -> Path:
        return self.folder / "checkpoints" / name

    def inference(self, name: str = "final") -> Any:
        return torch.load(self.checkpoint(name) / UNIT_INFERENCE_CHECKPOINT, weights_only=False)

    def state(self, name: str = "final") -> dict[str, Any]:
        """The state of the unit in a training checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            dcp_to_torch_save(self.checkpoint(name), f"{folder}/state.pt")
            return torch.load(f"{folder}/state.pt", weights_only=False)["unit_state"]


def run(config: Mapping[str, Any] | Path, name: str, *overrides: str) -> Run:
    """Run the host's command in this process.

    Args:
        config: a config, or the path of one, such as a checkpoint's resume.yaml.
        name: of the run's folder.
        overrides: of Hydra.
    """
    if isinstance(config, Path):
        path, made = config, OmegaConf.to_container(OmegaConf.load(config))
    else:
        made = copy.deepcopy(dict(config))
        path = Path(made["job"]["run_dir"]) / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(made))
    new = "" if "timestamp_id" in made["job"] else "+"
    finished = Run(Path(made["job"]["run_dir"]) / name)
    with _watched(finished):
        hydra.core.global_hydra.GlobalHydra.instance().clear()
        try:
            main(Namespace(config=str(path)), [f"{new}job.timestamp_id={name}", *overrides])
        finally:
            if distutils.initialized():  # a run that raised leaves its process group, and the next could not begin
                distutils.cleanup()
    return finished


class _watched(logging.Handler):
    """While entered, what the host logs goes to a run, and so does its unit."""

    _LEFT_OUT = ("setup_logging", "write_environment_report")  # the latter takes longer than the run

    def __init__(self, finished: Run) -> None:
        super().__init__(logging.INFO)
        self.finished = finished

    def emit(self, record: logging.LogRecord) -> None:
        value = record.args if isinstance(record.args, dict) else record.msg
        self.finished.lines.append(value if isinstance(value, dict) else record.getMessage())

    def __enter__(self) -> None:
        root, finished = logging.getLogger(), self.finished
        self.before = root.handlers[:], root.level, {name: getattr(launch, name) for name in self._LEFT_OUT}
        self.instantiate = hydra.utils.instantiate
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        root.handlers = [self]
        root.setLevel(logging.INFO)

        def instantiate(*args: Any, **kwargs: Any) -> Any:
            runner = self.instantiate(*args, **kwargs)
            finished.unit = getattr(runner, "train_eval_unit", finished.unit)
            return runner

        for name in self._LEFT_OUT:
            setattr(launch, name, lambda *_, **__: None)
        hydra.utils.instantiate = instantiate

    def __exit__(self, *_: Any) -> None:
        root = logging.getLogger()
        root.handlers, level, left_out = self.before
        root.setLevel(level)
        for name, function in left_out.items():
            setattr(launch, name, function)
        hydra.utils.instantiate = self.instantiate
        for number, handler in self.handlers.items():  # the host leaves its own
            signal.signal(number, handler)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states differ, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}/{key}: missing" for key in set(a) ^ set(b)]
        return missing + [line for key in set(a) & set(b) for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{path}: {(a.double() - b.double()).abs().max():.3g}"]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a} and {b}"]
