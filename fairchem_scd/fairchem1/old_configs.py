"""Configs written before fairchem 1.0, in the form that configs have had since.

The host's own `update_config` translates outputs and losses, but neither of these blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPLITS = ("train", "val", "test")


def with_model_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose `model` is a block, {"name": …, arguments}: it was the name alone, beside `model_attributes`."""
    if isinstance(config.get("model"), Mapping):
        return dict(config)
    attributes = config.get("model_attributes") or {}
    others = {key: value for key, value in config.items() if key != "model_attributes"}
    return {**others, "model": {"name": config.get("model"), **attributes}}


def with_dataset_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose `dataset` has a block for each split: it was a list, and its format was `task.dataset`."""
    blocks = config.get("dataset") or {}
    if isinstance(blocks, list):
        blocks = dict(zip(SPLITS, blocks, strict=False))
    kind, train = (config.get("task") or {}).get("dataset"), blocks.get("train") or {}
    if kind is not None:
        blocks = {
            split: block if split not in SPLITS or not block or _has_format(block, train) else {"format": kind, **block}
            for split, block in blocks.items()
        }
    return {**config, "dataset": blocks}


def _has_format(block: Mapping[str, Any], train: Mapping[str, Any]) -> bool:
    return "format" in block or (block.get("use_train_settings", True) and "format" in train)
