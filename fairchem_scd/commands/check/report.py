"""What a check found: lines while it runs, and at its end all problems once more."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from fairchem_scd.errors import ConfigError, DataError


class Report:
    """Lines under headings, and problems.

    Args:
        write: called with each line.

    Attributes:
        problems: reasons why the config cannot be trained.
        cautions: what a user should know of a config that can.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.problems: list[str] = []
        self.cautions: list[str] = []

    def say(self, heading: str, text: str) -> None:
        """A line, under a heading of at most 11 letters."""
        self._write(f"{heading:<12}{text}")

    def problem(self, text: str) -> None:
        """Report a reason why the config cannot be trained. The same text is reported once."""
        if text not in self.problems:
            self.problems.append(text)
            self._write(f"{'':<12}PROBLEM {len(self.problems)}: {shorten(text, 90)}")

    def caution(self, text: str) -> None:
        """Keep for the end what a user should know."""
        if text not in self.cautions:
            self.cautions.append(text)

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """While entered, an error becomes a problem. It ends this part, and the check goes on with the next.

        Args:
            what: begins the problem where the error is not one of this package's.
        """
        try:
            yield
        except (ConfigError, DataError) as error:
            self.problem(str(error))
        except Exception as error:
            # An error of the host or of a library: say where it comes from, too.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            self.problem(f"{what}: {type(error).__name__}: {error} ({where})")

    def close(self) -> bool:
        """Write all cautions and problems. Returns whether there are no problems."""
        for title, found in (("To know", self.cautions), ("Problems", self.problems)):
            if found:
                self._write(f"\n{title}:")
            for number, text in enumerate(found, 1):
                self._write(f"{number:>3}. " + text.replace("\n", "\n     "))
        self._write("" if self.problems else "\nNo problems found.")
        return not self.problems
