"""`fairchem-scd`: what a user does before and after training. One command a file.

Commands import torch and the host inside their functions: help must not wait for either.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import click

from fairchem_scd.errors import ConfigError, DataError

_COMMANDS = ("add", "check", "export", "import", "embed", "plot", "compare")


class _Commands(click.Group):
    """Commands by the name of their module; errors that users can mend end in one line and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = "import_" if name == "import" else name  # a keyword of Python
        return importlib.import_module(f"fairchem_scd.commands.{module}").command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigError, DataError) as error:
            raise click.ClickException(str(error)) from error
        except FileNotFoundError as error:
            raise click.ClickException(f"{error.filename}: {error.strerror}") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fairchem-scd")
def main() -> None:
    """Before and after training with fairchem-scd.

    Before: `add` puts a denoising task into a config you have, `check` tries a config out. Training itself is
    fairchem's: `fairchem --mode train --config-yml CONFIG` on fairchem 1.x, `fairchem -c CONFIG` on 2.x. After: `plot`
    draws a run's curves, `compare` says whether a task helped, `embed` writes embeddings of structures. On fairchem 1.x
    alone, `export` makes a checkpoint that fairchem loads without this package, and `import` reads checkpoints of other
    DeNS codes; on 2.x neither is needed.
    """
    warnings.simplefilter("ignore", FutureWarning)  # of the host's, at every import
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
