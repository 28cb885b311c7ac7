"""Checkpoint files: read with one clear error, written whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from fairchem_scd.errors import ConfigError
from fairchem_scd.host import missing


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: the file is no fairchem checkpoint, or one of fairchem 2.x.
    """
    if (Path(path) / "resume.yaml").is_file():
        raise ConfigError(missing(f"{path}", 2))
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "checkpoint file not found", str(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fairchem.core.units"):  # which an inference checkpoint of 2.x asks for
            raise ConfigError(missing(f"{path}", 2)) from error
        raise ConfigError(f"{path}: not a checkpoint that can be read here ({error})") from error
    except Exception as error:
        raise ConfigError(f"{path}: not a checkpoint, or cut short ({error})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "config"} <= set(checkpoint):
        raise ConfigError(f"{path}: not a fairchem checkpoint: it has no 'state_dict' and 'config'")
    if not isinstance(checkpoint["state_dict"], dict) or not isinstance(checkpoint["config"], dict):
        raise ConfigError(f"{path}: not a fairchem checkpoint: its 'state_dict' and 'config' are not mappings")
    return checkpoint


def what_next(folder: str, outputs: Collection[str]) -> str:
    """What a user does with a finished run's checkpoints.

    Args:
        folder: of the checkpoints.
        outputs: that the model has; none after pre-training, which predicts nothing yet.
    """
    best, last = (Path(folder) / name for name in ("best_checkpoint.pt", "checkpoint.pt"))
    found = f"  best on validation:   {best}\n" if best.is_file() else ""
    best = best if best.is_file() else last  # without validation there is no best
    use = "  {}:     {}\n".format(*how_to_use(str(best), outputs)) if outputs else ""
    return (
        f"Training is done.\n"
        f"{found}"
        f"  last, to resume from: {last}\n"
        f"Next:\n"
        f"{use}"
        f"  train it further:    fairchem --mode train --config-yml YOUR.yml --checkpoint {last}\n"
        f"  fine-tune from it:   model.finetune_config.starting_checkpoint: {best}"
    )


def how_to_use(path: str, outputs: Collection[str]) -> tuple[str, str]:
    """What a model with these outputs is for, and the command; the host's calculator has energies and forces alone."""
    if "energy" in outputs:
        return "use it with ASE", f"OCPCalculator(checkpoint_path='{path}')"
    return "predict with it", f"fairchem --mode predict --config-yml YOUR.yml --checkpoint {path}"
