"""One split of a config's data by itself, without a trainer: in the data's order, each structure once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fairchem.core.common.utils import load_config, setup_imports
from fairchem.core.datasets.base_dataset import create_dataset

from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1.data.numbered import Numbered
from fairchem_scd.fairchem1.data.sources import check_source

_SPLITS = ("train", "val", "test")


def read_config(path: str | Path) -> dict[str, Any]:
    """A config as the host reads it.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is no config, or what it includes is missing or contradicts itself.
    """
    try:
        config, _, conflicts = load_config(str(path))
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: not a config that fairchem can read ({said(error)})") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"{path}: not a config that fairchem can read (it holds no keys)")
    if conflicts:
        raise ConfigError(f"{path}: includes: two files both set {', '.join(sorted(set(conflicts)))}")
    return config


def load_split(config: Mapping[str, Any], split: str) -> Any:
    """The structures of one split of a config, each once, in the data's own order.

    Args:
        config: with a `dataset` block as in training; `val` and `test` inherit format and key mapping from `train`.
        split: "train", "val" or "test".

    Raises:
        ConfigError: the config names no such data, or it cannot be opened.
        DataError: its first structure cannot be read.
    """
    blocks = config.get("dataset") or {}
    if isinstance(blocks, list):  # before fairchem 1.0
        blocks = dict(zip(_SPLITS, blocks, strict=False))
    own, train = (dict(blocks.get(key) or {}) for key in (split, "train"))
    if not own.get("src"):
        there = [f"dataset.{key}" for key in _SPLITS if (blocks.get(key) or {}).get("src")]
        raise ConfigError(
            f"dataset.{split}.src: missing; it names the data. The config has {' and '.join(there) or 'no data at all'}"
        )
    block = {"format": (config.get("task") or {}).get("dataset", "lmdb")}  # where it stood before fairchem 1.0
    block |= copy.deepcopy({**(train if own.get("use_train_settings", True) else {}), **own})
    if f"{split}_split_settings" in block:
        block["splits"] = {split: block.pop(f"{split}_split_settings")}
    check_source(f"dataset.{split}", block, train)
    setup_imports()  # formats by name
    try:
        dataset = create_dataset(block, split)
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise ConfigError(f"dataset.{split}: cannot be opened ({said(error)})") from error
    if not len(dataset):
        raise ConfigError(f"dataset.{split}: no structures")
    dataset.indices = np.sort(np.asarray(dataset.indices))  # the host shuffles them
    return dataset if "sid" in read_row(dataset, 0) else Numbered(dataset)


def read_row(dataset: Any, index: int) -> Any:
    """A row of a host dataset. Raises DataError where it cannot be read."""
    try:
        return dataset[index]
    except Exception as error:
        raise DataError(
            f"structure {index} of the data cannot be read ({said(error)}). An ASE database without labels must not be "
            "asked for any: a2g_args: {r_energy: false, r_forces: false}"
        ) from error


def said(error: Exception) -> str:
    """The first line of an error's message, or its name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
