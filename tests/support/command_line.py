"""The two commands, in this process: starting another Python takes long."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from click.testing import CliRunner, Result
from fairchem.core._cli import main as fairchem_main
from fairchem.core.common import distutils
from fairchem.core.common.flags import flags

import tests.support.once  # noqa: F401  (makes models quick to build)
from fairchem_scd.commands import main


def fairchem(*words: Any) -> None:
    """The host's command."""
    with mock.patch.dict(os.environ):  # the host sets variables for its processes
        try:
            fairchem_main(*flags.get_parser().parse_known_args([str(word) for word in words]))
        finally:
            distutils.cleanup()


def fairchem_on(config: dict[str, Any], folder: Path, *words: Any) -> None:
    """The host's command on a config, on the CPU, with all that it writes in a new folder."""
    folder.mkdir()
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    fairchem("--config-yml", folder / "config.yml", "--run-dir", folder, "--cpu", *words)


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
