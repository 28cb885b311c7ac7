"""Config files of fairchem 2.x, read as the host reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from fairchem.core._cli import get_hydra_config_from_yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairchem_scd.errors import ConfigError, first_line
from fairchem_scd.host import missing

UNIT = ("runner", "train_eval_unit")
"""Where the training unit stands in a config."""


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """A config as the host composes and resolves it.

    Args:
        path: of a .yaml or .yml file.
        overrides: as on the host's command line, such as `job.seed=1`.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is not a training config of fairchem 2.x, or cannot be composed.
    """
    path = Path(path)
    with path.open(encoding="utf-8") as file:
        try:
            content = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a config: no keys at the top of the file")
    if "trainer" in content or "includes" in content:
        raise ConfigError(missing(f"{path}", 1))
    GlobalHydra.instance().clear()  # an error in an earlier composition may have left it
    try:
        config = get_hydra_config_from_yaml(str(path), list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        hint = ""
        if path.suffix == ".yml" and "defaults" in content and "hydra" not in content:
            hint = "; fairchem copies a .yml file elsewhere before it reads it, so its defaults are not found: rename "
            hint += f"it to {path.with_suffix('.yaml').name}"
        raise ConfigError(f"{path}: fairchem cannot read it ({first_line(error)}){hint}") from error
    unit = OmegaConf.select(config, ".".join(UNIT))
    if not isinstance(unit, DictConfig) or "_target_" not in unit:
        raise ConfigError(f"{path}: {'.'.join(UNIT)}._target_ is missing, so it trains nothing")
    return config


def plain(config: DictConfig) -> dict[str, Any]:
    """What of a config is the same at every reading: all but the job's time stamp, names and folders."""
    whole = OmegaConf.to_container(config, resolve=True)
    job = whole.get("job") or {}
    kept = {key: value for key, value in job.items() if key not in ("run_name", "timestamp_id", "run_dir", "metadata")}
    # The unit holds a copy of the job.
    unit = {key: value for key, value in whole["runner"]["train_eval_unit"].items() if key != "job_config"}
    runner = {**whole["runner"], "train_eval_unit": unit}
    return {**whole, "job": kept, "runner": runner}
