"""Training configs: tiny ones on sample data, and files as the host reads them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from fairchem.core.common.utils import build_config

from fairchem_scd.testing import self_supervised, training_config
from tests.support.models import hydra_arguments

CONFIGS = Path(__file__).parents[2] / "configs"


def tiny_config(folder: Path, name: str = "equiformer_v2", denoising: Any = None, **changes: Any) -> dict[str, Any]:
    """A whole training config on sample data: EquiformerV2's trainer, two steps an epoch, one epoch.

    Args:
        folder: where sample data is kept.
        name: a backbone of `BACKBONES`.
        denoising: the `task.denoising` block; default DeNS on every step.
        changes: blocks to update, such as optim={"max_epochs": 2}.
    """
    denoising = {"dens": {"prob": 1.0}} if denoising is None else denoising
    config = training_config(folder, hydra_arguments(name), denoising)
    for block, update in changes.items():
        config[block] = {**config[block], **update} if isinstance(update, dict) else update
    return config


def pretraining(folder: Path, name: str = "equiformer_v2", denoising: Any = None, **changes: Any) -> dict[str, Any]:
    """`tiny_config` that trains no outputs; by default SCD."""
    return self_supervised(tiny_config(folder, name, {"scd": {}} if denoising is None else denoising, **changes))


def host_config(path: Path, *, timestamp_id: str | None = None, run_dir: str = "./") -> dict[str, Any]:
    """A config file as the host's own build_config reads it."""
    arguments = Namespace(
        config_yml=path, mode="train", identifier="", timestamp_id=timestamp_id, seed=0, debug=False, run_dir=run_dir,
        print_every=10, amp=False, checkpoint=None, cpu=True, submit=False, summit=False, num_nodes=1, num_gpus=1,
        gp_gpus=None,
    )  # fmt: skip
    return build_config(arguments, [])
