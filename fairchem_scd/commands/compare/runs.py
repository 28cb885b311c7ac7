"""The runs that are compared, as the user names them, and their logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from fairchem_scd.commands.plot.curves import Curve
from fairchem_scd.commands.plot.host_log import host_log
from fairchem_scd.errors import ConfigError

ENDING = "_mae"
"""Of the tags of errors."""


def named(words: Sequence[str]) -> dict[str, list[str]]:
    """Folders of runs by their name, from words such as `plain=FOLDER`; `*` in a folder stands for several, in order.

    Raises:
        ConfigError: a word is not of this kind, there is no such folder, or there are fewer than two names.
    """
    folders: dict[str, list[str]] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"{word}: give each run as NAME=RUN, such as plain=logs/tensorboard/my_run")
        found = sorted(glob(folder)) if has_magic(folder) and not Path(folder).exists() else [folder]
        if not found:
            raise ConfigError(f"{word}: there is nothing of this name")
        folders.setdefault(name, []).extend(found)
    if len(folders) < 2:
        raise ConfigError(
            f"all runs have the name '{next(iter(folders))}'; give runs of two names, the one to compare with first"
        )
    return folders


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        label: its name in what is printed.
        curves: by tag, such as `val/forces_mae`.
    """

    label: str
    curves: Mapping[str, Curve]


def read(folders: Mapping[str, Sequence[str]]) -> dict[str, list[Run]]:
    """The runs in some folders, by the name of their config.

    Args:
        folders: see `named`.

    Raises:
        ConfigError: a folder has no run or several, or two have the same.
    """
    log = host_log()
    short = [Path(folder).resolve().name for of in folders.values() for folder in of]
    seen: dict[Path, str] = {}
    runs: dict[str, list[Run]] = {}
    for name, of in folders.items():
        for folder in of:
            _, files = log.find_run(folder, several="give the folder of one of them:")
            for path in files:
                if path.resolve() in seen:
                    raise ConfigError(f"{name}={folder}: is the run of {seen[path.resolve()]}; give each run once")
            seen |= {path.resolve(): f"{name}={folder}" for path in files}
            label = Path(folder).resolve().name
            label = label if short.count(label) == 1 else folder
            runs.setdefault(name, []).append(Run(label, log.read_curves(files, (ENDING,))))
    return runs
