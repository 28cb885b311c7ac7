"""The two commands, in this process: starting another Python takes long."""

from __future__ import annotations

import logging
import os
import warnings
from argparse import Namespace
from typing import Any
from unittest import mock

import fairchem.core.launchers.slurm_launch as launch
from click.testing import CliRunner, Result
from fairchem.core._cli import main as fairchem_main
from fairchem.core.common import distutils
from hydra.core.global_hydra import GlobalHydra

from fairchem_scd.commands import main


def fairchem(*words: Any) -> str:
    """The host's command, given as `-c CONFIG` and overrides; what it logs."""
    option, config, *overrides = map(str, words)
    assert option == "-c"
    GlobalHydra.instance().clear()
    lines: list[str] = []
    handler, root = _Lines(lines), logging.getLogger()
    level = root.level
    with mock.patch.dict(os.environ), mock.patch.object(launch, "setup_logging"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        try:
            fairchem_main(Namespace(config=config), overrides)
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
            distutils.cleanup()
    return "\n".join(lines)


def fairchem_scd(*words: Any, code: int | None = 0) -> Result:
    """This package's command.

    Args:
        words: what stands after `fairchem-scd`.
        code: the exit status that is expected; None: any.
    """
    with mock.patch.dict(os.environ):
        result = CliRunner().invoke(main, [str(word) for word in words])
    assert code is None or result.exit_code == code, result.output
    return result


class _Lines(logging.Handler):
    """Notes lines as the console has them."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        # The host logs dictionaries, which Python takes for the message's arguments.
        message = str(record.msg) if isinstance(record.msg, dict) else record.getMessage()
        self.lines.append(f"{record.levelname}:{record.name}:{message}")
