"""Adds a denoising task to the text of a config, and checks the result as training would check it."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import UniqueKeyLoader, find_relative_file_in_paths, setup_imports

from fairchem_scd.commands.add.added import Added, differences
from fairchem_scd.commands.add.yaml_edit import map_items, set_value
from fairchem_scd.commands.config_file import read_config
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1 import plugin  # noqa: F401 (the plug-in registers with the host)
from fairchem_scd.fairchem1.config import check_outputs, read
from fairchem_scd.fairchem1.dens_aliases import denoising_block
from fairchem_scd.fairchem1.trainer import DenoisingMixin

_EPOCHS, _STEPS = "fairchem_scd.EquiformerV2DenoisingTrainer", "fairchem_scd.DenoisingTrainer"
_MLIP = "fairchem_scd.MLIPDenoisingTrainer"
_TRAINERS = {
    "equiformerv2_forces": _EPOCHS,
    "equiformerv2_dens": _EPOCHS,
    "mlip_trainer": _MLIP,
    "mlip_dens_trainer": _MLIP,
    "ocp": _STEPS,
    "forces": _STEPS,
    "energy": _STEPS,
    # The host knows these short names only where something has imported this package.
    "equiformerv2_denoising": _EPOCHS,
    "mlip_denoising": _MLIP,
    "denoising": _STEPS,
}


def add_task(config: str | Path, out: str | Path, task: str, settings: Mapping[str, Any]) -> Added:
    """Add a denoising task to a config of fairchem's, for a file at `out`, which is not written here.

    The merged config stays what it was, except for `trainer` and `task.denoising`. The new file includes the same
    files, under names by which fairchem finds them from out's folder when it runs in the current directory.

    Args:
        config: the config file.
        out: where the new file will lie; its folder is there.
        task: its name under `task.denoising`.
        settings: of the task. Others have their defaults.

    Raises:
        ConfigError: the config cannot be read, has the task already, or cannot be trained with it.
        FileNotFoundError: there is no such config.
    """
    setup_imports()
    config, out = Path(config), Path(out)
    merged, included = _load(config)
    if out.exists() and any(out.samefile(file) for file in included):
        raise ConfigError(f"{out}: {config} includes it, so the new file must have another name")
    block = _block(merged)
    if block.get(task) is not None:
        raise ConfigError(f"{config}: task.denoising.{task} is there already; change its settings there")
    trainer = _trainer(merged)

    # Without newline translation, so that line ends stay what they are.
    with config.open(encoding="utf-8", newline="") as file:
        before = file.read()
    after = before
    try:
        if config.parent.resolve() != out.parent.resolve():
            after = map_items(after, "includes", lambda name: _moved(name, config, out))
        if merged.get("trainer") != trainer:
            after = set_value(after, ("trainer",), trainer, after=("includes",))
        after = set_value(after, ("task", "denoising", task), dict(settings), after=("trainer", "includes"))
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", error)
        raise ConfigError(f"{config}: the task cannot be added to a file written like this ({reason})") from error

    expected = copy.deepcopy(merged)
    expected["trainer"] = trainer
    expected["task"] = {**(merged.get("task") or {}), "denoising": {**block, task: dict(settings)}}
    result = _load_text(after, config, out)
    changed = list(differences(expected, result))
    if changed and all(key.startswith(f"task.denoising.{task}.") for key in changed):
        raise ConfigError(
            f"{config}: task.denoising.{task}: null switches off what an included file sets; remove that line, and the "
            "task is back"
        )
    if changed:
        raise ConfigError(
            f"{config}: adding the task to a file written like this would change {', '.join(changed[:3])} too. An "
            "anchor, or a null that switches off what an included file says, has to be written out first"
        )
    return Added(before, after, *_check(result, task, settings))


def _files(path: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """A config file and all that it includes, in the host's order.

    Raises:
        ConfigError: names the file that cannot be read, and where.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, not a config")
    if any(path.samefile(file) for file in above):
        raise ConfigError(f"{path}: includes itself, by way of {', '.join(map(str, above))}")
    try:
        with path.open(encoding="utf-8") as file:
            config = yaml.load(file, Loader=UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: not YAML, line {error.problem_mark.line + 1}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        # The host raises ValueError for duplicate keys; the others are for characters that no YAML text has.
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a config: no keys at the top of the file")
    yield path
    includes = config.get("includes", [])
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: includes: expected a list of files (got {includes!r})")
    for name in includes:
        yield from _files(_found(name, path), (*above, path))


def _found(name: str, path: Path) -> Path:
    """The file that the host takes for an include. It looks in the current directory first."""
    try:
        return Path(find_relative_file_in_paths(name, [os.path.dirname(path)]))  # noqa: PTH120 (as the host asks)
    except ValueError:
        raise ConfigError(
            f"{path}: includes: there is no {name}, neither in the current directory nor in {path.parent}"
        ) from None


def _load(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The merged config, and the files that it includes."""
    _, *included = _files(path, ())
    return read_config(path), included


def _load_text(text: str, config: Path, out: Path) -> dict[str, Any]:
    """The merged config of a file that is not written yet, as the host will read it there."""
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".yml")
    os.close(handle)
    part = Path(name)
    try:
        part.write_text(text, encoding="utf-8", newline="")
        return _load(part)[0]
    except ConfigError as error:
        reason = str(error).replace(str(part), "the result")
        raise ConfigError(f"{config}: the task cannot be added to a file written like this ({reason})") from error
    except OSError as error:
        raise ConfigError(f"{out}: could not be written ({error.strerror}); nothing was changed") from error
    finally:
        part.unlink(missing_ok=True)


def _moved(name: str, config: Path, out: Path) -> str:
    """The name for a file that `config` includes by which the host finds it from `out`."""
    if Path(name).is_absolute():
        return name
    target = _found(name, config).resolve()
    folder = out.parent.resolve()
    near = Path(os.path.relpath(target, folder))
    # The host would take a file of the same name in the current directory first. The second candidate avoids that.
    for candidate in (near, Path("..", folder.name, near)):
        found = Path(find_relative_file_in_paths(candidate, [folder]))
        if found.resolve() == target:
            return candidate.as_posix()
    return target.as_posix()


def _block(merged: Mapping[str, Any]) -> dict[str, Any]:
    """The `task.denoising` block of a config. Raises ConfigError where DeNS is set up in its authors' words."""
    task, optim = merged.get("task") or {}, merged.get("optim") or {}
    for key, block in (("task", task), ("optim", optim)):
        if not isinstance(block, Mapping):
            raise ConfigError(f"{key}: expected a block (got {block!r})")
    if optim.get("use_denoising_pos"):
        trainer = _TRAINERS.get(str(merged.get("trainer")), _EPOCHS)
        raise ConfigError(
            "optim.use_denoising_pos sets up DeNS already, and fairchem-scd reads it as it is: name the trainer "
            f"{trainer} and leave the rest. For another task beside it, write DeNS as task.denoising.dens first, and "
            "remove use_denoising_pos"
        )
    return denoising_block(task, optim, {})


def _trainer(merged: Mapping[str, Any]) -> str:
    """The trainer of this package that takes the place of the config's."""
    name = merged.get("trainer") or "ocp"  # the host's own default
    if isinstance(name, str) and name in _TRAINERS:
        return _TRAINERS[name]
    try:
        if issubclass(registry.get_trainer_class(name), DenoisingMixin):
            return name
    except (RuntimeError, TypeError, AttributeError, ValueError):
        pass  # not a trainer at all: the error below says so
    known = [name for name in _TRAINERS if "denoising" not in name]
    raise ConfigError(
        f"trainer: '{name}' has no counterpart with denoising; known trainers: {', '.join(known)}. To make one of a "
        "trainer of your own: class MyDenoisingTrainer(fairchem_scd.DenoisingMixin, MyTrainer)"
    )


def _check(config: dict[str, Any], task: str, asked: Mapping[str, Any]) -> tuple[dict[str, float], bool]:
    """Check the config as the trainer will; return the share of each task, and whether it pre-trains."""
    setup = read(config)
    if not setup.shares[task] and "prob" not in asked:
        others = ", ".join(f"{name} {share:g}" for name, share in setup.shares.items() if share)
        raise ConfigError(f"task.denoising.{task}: would never run, since the others take every step ({others})")
    # Without outputs and without pre-training it is of an old format, which the host translates when it trains.
    if setup.self_supervised or config.get("outputs"):
        check_outputs(setup.tasks, config.get("outputs") or {}, config["loss_functions"])
    return setup.shares, setup.self_supervised
