"""Config files, read as the host reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from fairchem.core.common.utils import load_config

from fairchem_scd.errors import ConfigError, first_line
from fairchem_scd.host import missing


def read_config(path: str | Path) -> dict[str, Any]:
    """A config as the host reads it.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is no config, is of fairchem 2.x, or what it includes is missing or contradicts itself.
    """
    try:
        config, _, conflicts = load_config(str(path))
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: not a config that fairchem can read ({first_line(error)})") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"{path}: not a config that fairchem can read (it holds no keys)")
    if {"runner", "defaults"} & set(config) and "trainer" not in config:
        raise ConfigError(missing(f"{path}", 2))
    if conflicts:
        raise ConfigError(f"{path}: includes: two files both set {', '.join(sorted(set(conflicts)))}")
    return config
