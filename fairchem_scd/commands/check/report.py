"""What a check found: lines as it goes along, and the problems once more at its end."""

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
        write: takes each line as it is known.

    Attributes:
        problems: what keeps the config from training.
        cautions: what does not, and should be known.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.problems: list[str] = []
        self.cautions: list[str] = []

    def say(self, heading: str, text: str) -> None:
        """A line, under a heading of at most 11 letters."""
        self._write(f"{heading:<12}{text}")

    def problem(self, text: str) -> None:
        """Note what keeps the config from training, once."""
        if text not in self.problems:
            self.problems.append(text)
            self._write(f"{'':<12}PROBLEM {len(self.problems)}: {shorten(text, 90)}")

    def caution(self, text: str) -> None:
        """Note what a user should know."""
        if text not in self.cautions:
            self.cautions.append(text)

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """While entered, an error is a problem and ends this part alone."""
        try:
            yield
        except (ConfigError, DataError) as error:
            self.problem(str(error))
        except Exception as error:
            # Of the host or a library: its own words, and where they come from.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            self.problem(f"{what}: {type(error).__name__}: {error} ({where})")

    def close(self) -> bool:
        """Write cautions and problems out. Returns whether there are no problems."""
        for title, found in (("To know", self.cautions), ("Problems", self.problems)):
            if found:
                self._write(f"\n{title}:")
            for number, text in enumerate(found, 1):
                self._write(f"{number:>3}. " + text.replace("\n", "\n     "))
        self._write("" if self.problems else "\nNo problems found.")
        return not self.problems
