"""The `task.denoising` block of a config, read into the classes of `settings`."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.settings import CellRepeatSettings, DenoisingBlock, DropPathSettings, Settings
from fairchem_scd.errors import ConfigError

# Probabilities that sum to 1 may miss it by a rounding error.
_ROUNDING = 1e-9

WITHOUT_A_TASK = (
    "New heads start with the host's random weights; in fine-tuning, quiet_heads: true lets those of energies and "
    "other scalars begin by predicting zero"
)
"""What a block means for new heads that turns on no task and does not ask for quiet ones."""


@dataclass(frozen=True)
class Denoising:
    """A parsed `task.denoising` block.

    Attributes:
        tasks: settings of each task that is on, by name, with every `prob` filled in.
        restart, on_bad_data, quiet_heads, drop_path, drop_path_per, repeat_cells: the block's own settings.
    """

    tasks: dict[str, Settings]
    restart: bool
    on_bad_data: str
    quiet_heads: bool | None
    drop_path: DropPathSettings | None
    drop_path_per: str | None
    repeat_cells: CellRepeatSettings | None

    @property
    def without_tasks(self) -> str:
        """What a block means that turns on no task, for a warning."""
        fields = DenoisingBlock.model_fields.items()
        acting = [name for name, field in fields if getattr(self, name) != field.default]
        if not acting:
            return f"{key_of()} turns on no task: this trains as the host's trainer would. {WITHOUT_A_TASK}"
        return f"{key_of()} turns on no task: no step denoises. Its other settings count: {', '.join(acting)}"


def parse_denoising(block: Any, tasks: dict[str, type[Settings]]) -> Denoising:
    """Parse the `task.denoising` block.

    Args:
        block: the block as read from YAML. A task set to null is off.
        tasks: settings class of every known task, by name.

    Raises:
        ConfigError: names each offending key with what was wrong.
    """
    model = create_model("Denoising", __base__=DenoisingBlock, **{n: (cls | None, None) for n, cls in tasks.items()})
    try:
        parsed = model.model_validate({} if block is None else without_former(block, tasks))
    except ValidationError as error:
        own = {"drop_path": DropPathSettings, "repeat_cells": CellRepeatSettings}
        raise ConfigError(_explain(error, {"": model, **own, **tasks})) from None
    settings = {name: getattr(parsed, name) for name in tasks if getattr(parsed, name) is not None}
    own = {name: getattr(parsed, name) for name in DenoisingBlock.model_fields}
    return Denoising(_fill_probabilities(settings), **own)


def without_former(block: Any, tasks: Mapping[str, type[Settings]]) -> Any:
    """A `task.denoising` block without settings that are no more, each of which is warned of."""
    if not isinstance(block, Mapping):
        return block
    kept = dict(block)
    for name, cls in tasks.items():
        given = block.get(name)
        former = [key for key in cls.former if isinstance(given, Mapping) and key in given]
        for key in former:
            logging.warning("%s has no effect: %s; leave it out", key_of(name, key), cls.former[key])
        if former:
            kept[name] = {key: value for key, value in given.items() if key not in former}
    return kept


def _fill_probabilities(settings: dict[str, Settings]) -> dict[str, Settings]:
    """Give every task without a `prob` an equal part of what the others leave."""
    taken = {name: s.prob for name, s in settings.items() if s.prob is not None}
    if sum(taken.values()) > 1 + _ROUNDING:
        shares = ", ".join(f"{key_of(name, 'prob')} = {prob:g}" for name, prob in taken.items())
        raise ConfigError(f"{shares}: a step has at most one task, so the probabilities must sum to at most 1")
    rest = max(0.0, 1 - sum(taken.values())) / max(1, len(settings) - len(taken))
    return {name: s if s.prob is not None else s.model_copy(update={"prob": rest}) for name, s in settings.items()}


def _explain(error: ValidationError, models: dict[str, type[BaseModel]]) -> str:
    lines = []
    for issue in error.errors():
        path = [str(part) for part in issue["loc"]]
        key = key_of(*path)
        if issue["type"] == "extra_forbidden":
            owner = models.get(path[0], models[""]) if len(path) > 1 else models[""]
            known = list(owner.model_fields)
            close = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif issue["type"] == "model_type":  # pydantic's message names a class of ours
            example = "settings in braces, which may be none: {}" if path else "tasks, such as {scd: {}}"
            lines.append(f"{key}: expected {example} (got {issue['input']!r})")
        else:
            reason = issue["msg"].removeprefix("Value error, ")
            value = f" (got {issue['input']!r})" if not isinstance(issue["input"], dict) else ""
            lines.append(f"{key}: {reason}{value}")
    return "\n".join(lines)
