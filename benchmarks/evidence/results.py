"""Results of the studies: one JSON line a finished run, in files that several processes may add to."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def key_of(settings: Mapping[str, Any]) -> str:
    """A name for settings: equal settings have equal names, whatever the order of their keys."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Results:
    """A file of results, whose lines are `{"run": settings, …}`.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[dict[str, Any]]:
        """All whole lines, in order. A line cut short by the end of its writer is left out."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [record for number, line in enumerate(lines, 1) if (record := self._record(line, number)) is not None]

    def _record(self, line: str, number: int) -> dict[str, Any] | None:
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            logging.warning("%s:%d is not a whole line; its run counts as not done", self.path.name, number)
            return None

    def __contains__(self, settings: Mapping[str, Any]) -> bool:
        key = key_of(settings)
        return any(key_of(record["run"]) == key for record in self.records())

    @contextmanager
    def claimed(self, settings: Mapping[str, Any], *, wait: bool = False) -> Iterator[bool]:
        """While entered with True, no other process does the run of these settings.

        Args:
            wait: wait for a process that is at it, instead of returning False.

        Yields:
            Whether the run is still to be done, and by this process. A claim ends with its process.
        """
        folder = self.path.with_suffix(".claims")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / key_of(settings))
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield settings not in self
        finally:
            lock.release()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, whole, after whatever other processes have added."""
        folder = self.path.with_suffix(".claims")
        folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, allow_nan=False) + "\n"
        with FileLock(folder / "append"), self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())


def environment() -> dict[str, str]:
    """What a result may depend on beside its settings: the code's commit, versions, the processor."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "fairchem-core")},
        "processor": _processor(),
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no", "--", "*.py") else ""
    return git("rev-parse", "--short=10", "HEAD") + changed


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.machine()
