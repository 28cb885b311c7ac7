"""A run's TensorBoard log as curves.

TensorBoard's own EventAccumulator keeps every tag and checks every byte, which takes ten minutes and more for the log
of a long run. Here only the tags that are asked for are parsed.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from fairchem_scd.commands.plot.curves import Curve, curve_of
from fairchem_scd.errors import ConfigError

_NAMES = "events.out.tfevents*"
_VERSION = "brain.Event:"  # what the first record of every event file says
_SHOWN = 10


def find_run(
    folder: str | Path, name: str | None = None, *, several: str = "choose one by --run:"
) -> tuple[str, list[Path]]:
    """The event files of one run, anywhere under a folder.

    Args:
        folder: a `--run-dir`, its `logs`, or a run's own log folder.
        name: of the run's log folder, with or without the folders above it. Needed where there are several runs.
        several: what the error says to do where there are several runs and no name.

    Returns:
        The run's name, and its event files, the oldest first. A resumed run has several.

    Raises:
        ConfigError: there is no run, none of that name, or more than one.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ConfigError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name the folder of the run")
    files = sorted((path for path in folder.rglob(_NAMES) if path.is_file()), key=_age)
    if not files:
        raise ConfigError(
            f"{folder}: no TensorBoard log in it or below (files named {_NAMES}); `logger: tensorboard` in the config "
            "writes one, under logs/tensorboard in the --run-dir"
        )
    runs: dict[str, list[Path]] = {}
    for path in files:
        # A run that ended before its first step leaves a file without values.
        if any(event.summary.value for event in _events(path)):
            runs.setdefault(path.parent.relative_to(folder).as_posix(), []).append(path)
    if not runs:
        raise ConfigError(f"{folder}: the log is empty; the run has not come to its first step")
    found = [run for run in runs if name is None or name in (run, run.rpartition("/")[2])]
    if len(found) != 1:
        listed = ", ".join(sorted(found or runs)[:_SHOWN]) + (", …" if len(found or runs) > _SHOWN else "")
        wrong = f"no run '{name}'; there are" if not found else f"{len(found)} runs; {several}"
        raise ConfigError(f"{folder}: {wrong} {listed}")
    label = folder.resolve().name if found[0] == "." else found[0].rpartition("/")[2]
    return label, runs[found[0]]


def read_curves(files: Sequence[Path], endings: tuple[str, ...]) -> dict[str, Curve]:
    """Curves of the scalars that a run logged.

    Args:
        files: event files of one run, the oldest first. Where two have the same step, the later file counts.
        endings: of the tags to read.

    Returns:
        A curve for each tag, such as `train/loss`.

    Raises:
        ConfigError: a file cannot be read, or is no event file.
    """
    values: dict[str, dict[int, float]] = {}
    needles = [ending.encode() for ending in endings]
    for path in files:
        for event in _events(path, needles):
            for value in event.summary.value:
                if value.tag.endswith(endings):
                    values.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: curve_of(points) for tag, points in values.items()}


def _events(path: Path, needles: Sequence[bytes] = (b"",)) -> Iterator[Event]:
    """The events of a file whose record holds one of the needles. A record that is cut short ends the file."""
    try:
        with path.open("rb") as file:
            for number, record in enumerate(_records(file, path)):
                if number == 0:
                    if not Event.FromString(record).file_version.startswith(_VERSION):
                        raise ConfigError(f"{path}: not a TensorBoard event file")
                elif any(needle in record for needle in needles):
                    yield Event.FromString(record)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except DecodeError:
        logging.warning("%s: damaged; what comes before counts", path)


def _records(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The whole records. One is its length (8 bytes), a checksum of that (4), an Event, and a checksum of that (4)."""
    size, at = path.stat().st_size, 0
    while at < size:
        head = file.read(12)
        length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
        if at == 0 and not 0 < length < 1000:  # the first is short: it tells the version
            raise ConfigError(f"{path}: not a TensorBoard event file")
        at += 16 + length
        if not length or at > size:
            logging.warning("%s: cut short; what is whole counts", path)
            return
        yield file.read(length)
        file.read(4)


def _age(path: Path) -> tuple[int, str]:
    """The time in an event file's name (events.out.tfevents.TIME.HOST.…), seconds."""
    time = path.name.split(".")[3:4]
    return (int(time[0]) if time and time[0].isdigit() else 0, path.name)
