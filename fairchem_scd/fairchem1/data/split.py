"""The structures of one split of a config, read without a trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from fairchem.core.common.utils import setup_imports
from fairchem.core.datasets.base_dataset import create_dataset

from fairchem_scd.errors import ConfigError, DataError, first_line
from fairchem_scd.fairchem1.data.numbered import Numbered
from fairchem_scd.fairchem1.data.sources import check_source
from fairchem_scd.fairchem1.old_configs import SPLITS, with_dataset_blocks


def load_split(config: Mapping[str, Any], split: str) -> Any:
    """The structures of one split of a config, each once, in the data's own order.

    Args:
        config: with a `dataset` block as in training; `val` and `test` inherit format and key mapping from `train`.
        split: "train", "val" or "test".

    Raises:
        ConfigError: the config names no such data, or it cannot be opened.
        DataError: its first structure cannot be read.
    """
    blocks = with_dataset_blocks(config)["dataset"]
    own, train = (dict(blocks.get(key) or {}) for key in (split, "train"))
    if not own.get("src"):
        there = [f"dataset.{key}" for key in SPLITS if (blocks.get(key) or {}).get("src")]
        raise ConfigError(
            f"dataset.{split}.src: missing; it names the data. The config has {' and '.join(there) or 'no data at all'}"
        )
    inherited = train if own.get("use_train_settings", True) else {}
    block = copy.deepcopy({"format": "lmdb", **inherited, **own})
    if f"{split}_split_settings" in block:
        block["splits"] = {split: block.pop(f"{split}_split_settings")}
    check_source(f"dataset.{split}", block, train)
    setup_imports()  # formats by name
    try:
        dataset = create_dataset(block, split)
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise ConfigError(f"dataset.{split}: cannot be opened ({first_line(error)})") from error
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
            f"structure {index} of the data cannot be read ({first_line(error)}). An ASE database without labels must "
            "not be asked for any: a2g_args: {r_energy: false, r_forces: false}"
        ) from error
