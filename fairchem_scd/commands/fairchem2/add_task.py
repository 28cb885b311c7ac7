"""Adds a denoising task to the text of a fairchem 2.x config: one `_target_` and one block."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fairchem_scd.commands.add.added import Added, differences
from fairchem_scd.commands.add.yaml_edit import set_value
from fairchem_scd.commands.fairchem2.config_file import UNIT, plain, read_config
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.errors import ConfigError

OURS = "fairchem_scd.DenoisingTrainEvalUnit"
_HOSTS = "fairchem.core.units.mlip_unit.mlip_unit.MLIPTrainEvalUnit"
_TARGETS = {_HOSTS, "fairchem.core.units.mlip_unit.MLIPTrainEvalUnit", OURS}
_BLOCK = ".".join((*UNIT, "denoising"))


def add_task(config: str | Path, out: str | Path, task: str, settings: Mapping[str, Any]) -> Added:
    """Add a denoising task to a config, for a file at `out`, which is not written here.

    The composed config stays what it was, except for `_target_` and `denoising` of `runner.train_eval_unit`.

    Args:
        config: the config file.
        out: where the new file will lie; its folder is there.
        task: its name in the denoising block.
        settings: of the task. Others have their defaults.

    Raises:
        ConfigError: the config cannot be read, has the task already, or cannot be trained with it.
        FileNotFoundError: there is no such config.
    """
    config, out = Path(config), Path(out)
    whole = plain(read_config(config))
    unit = whole["runner"]["train_eval_unit"]
    if unit["_target_"] not in _TARGETS:
        raise ConfigError(
            f"{config}: {'.'.join(UNIT)}._target_: '{unit['_target_']}' has no counterpart with denoising; it is "
            f"{_HOSTS} in a config that can be changed"
        )
    block = unit.get("denoising") or {}
    if block.get(task) is not None:
        raise ConfigError(f"{config}: {_BLOCK}.{task} is there already; change its settings there")
    with config.open(encoding="utf-8", newline="") as file:  # line ends stay what they are
        before = file.read()
    _check_place(yaml.safe_load(before), config, out)
    after = before
    try:
        after = _edited(after, task, settings)
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        reason = getattr(error, "problem", None) or error
        raise ConfigError(f"{config}: the task cannot be added to a file written like this ({reason})") from error
    expected = copy.deepcopy(whole)
    expected["runner"]["train_eval_unit"].update(_target_=OURS, denoising={**block, task: dict(settings)})
    changed = list(differences(expected, _composed(after, config, out)))
    if changed:
        raise ConfigError(
            f"{config}: adding the task to a file written like this would change {', '.join(changed[:3])} too; write "
            f"the lines by hand: {'.'.join(UNIT)}._target_: {OURS}, and {_BLOCK}: {{{task}: {{}}}}"
        )
    return Added(before, after, *_check({**block, task: dict(settings)}, task, settings, bool(unit.get("tasks"))))


def _edited(text: str, task: str, settings: Mapping[str, Any]) -> str:
    """The text with both changes."""
    own = (yaml.safe_load(text).get(UNIT[0]) or {}).get(UNIT[1])
    if not own:  # another file has the unit
        both = {"_target_": OURS, "denoising": {task: dict(settings)}}
        return set_value(text, UNIT, both, after=("defaults", "hydra"))
    if own.get("_target_") != OURS:
        text = set_value(text, (*UNIT, "_target_"), OURS)
    return set_value(text, (*UNIT, "denoising", task), dict(settings), below="_target_")


def _check_place(content: Mapping[str, Any], config: Path, out: Path) -> None:
    """Names under `defaults` are looked for beside the file, so it has to stay in its folder."""
    named = [entry for entry in content.get("defaults") or () if entry != "_self_"]
    if not named:
        return
    if out.parent.resolve() != config.parent.resolve() and "hydra" not in content:
        raise ConfigError(
            f"{out}: {config} takes other files by `defaults`, which are looked for beside it; write the "
            f"new file to {config.parent}"
        )
    if out.suffix == ".yml" and "hydra" not in content:
        raise ConfigError(
            f"{out}: fairchem does not find the files under `defaults` from a .yml file; name it "
            f"{out.with_suffix('.yaml').name}"
        )


def _composed(text: str, config: Path, out: Path) -> dict[str, Any]:
    """The config of a file that is not written yet, as the host will read it there."""
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f"{out.stem}_", suffix=out.suffix)
    os.close(handle)
    part = Path(name)
    try:
        part.write_text(text, encoding="utf-8", newline="")
        return plain(read_config(part))
    except ConfigError as error:
        reason = str(error).replace(str(part), "the result")
        raise ConfigError(f"{config}: the task cannot be added to a file written like this ({reason})") from error
    except OSError as error:
        raise ConfigError(f"{out}: could not be written ({error.strerror}); nothing was changed") from error
    finally:
        part.unlink(missing_ok=True)


def _check(
    block: Mapping[str, Any], task: str, asked: Mapping[str, Any], supervised: bool
) -> tuple[dict[str, float], bool]:
    """Check the block as training will; return the share of each task, and whether it pre-trains."""
    tasks, _ = build_tasks(block, supervised)
    shares = {name: built.settings.prob for name, built in tasks.items()}
    if not shares[task] and "prob" not in asked:
        others = ", ".join(f"{name} {share:g}" for name, share in shares.items() if share)
        raise ConfigError(f"{_BLOCK}.{task}: would never run, since the others take every step ({others})")
    return shares, not supervised
