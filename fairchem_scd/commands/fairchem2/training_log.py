"""What a run of fairchem 2.x logged, as curves: from the local files of Weights & Biases, or from console output.

Weights & Biases keeps every record of a run in one file on disk, `run-ID.wandb`, whether it also sends them or not.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

from fairchem_scd.commands.plot.curves import Curve, curve_of
from fairchem_scd.errors import ConfigError

_CONSOLE = ("*.log", "*.out", "*.err", "*.txt")
_HEADER, _BLOCK = 7, 2**15
_WHOLE, _FIRST, _LAST = 1, 2, 4  # kinds of a record's parts; those in the middle are 3
_VALIDATION = re.compile(r"val/(?P<dataset>[^,]+)\.[^,.]+,(?P<task>[^,]+),(?P<metric>(?:per_atom_)?mae)")
_LOGGED = re.compile(r"\{'(?P<split>train|val)/.*\}")
_STEPS_DONE = re.compile(r"Validation after (\d+) steps")
_VALIDATED = re.compile(r"^\s*(val/\S+): (\S+)$")
_SHOWN = 10

Points = dict[str, dict[int, float]]


def find_run(
    folder: str | Path, name: str | None = None, *, several: str = "choose one by --run:"
) -> tuple[str, list[Path]]:
    """The log files of one run.

    Args:
        folder: a `job.run_dir`, a run's folder in it, any folder with a log below it, or a file of console output.
        name: of the run (`job.timestamp_id`), or of a file of console output. Needed where there are several.
        several: what the error says to do where there are several and no name.

    Returns:
        The run's name, and its files, the oldest first. A resumed run has several.

    Raises:
        ConfigError: there is no run, none of that name, or more than one.
    """
    folder = Path(folder)
    if folder.is_file():
        return folder.stem, [folder]
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    runs: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("run-*.wandb"), key=lambda path: path.parent.name):
        if "latest-run" not in path.parts:  # a link to another folder
            runs.setdefault(path.stem.removeprefix("run-"), []).append(path)
    if not runs:
        for path in sorted({found for pattern in _CONSOLE for found in folder.rglob(pattern)}):
            if path.is_file() and "'train/loss'" in path.read_text(errors="replace"):
                runs.setdefault(path.stem, []).append(path)
    if not runs:
        raise ConfigError(
            f"{folder}: no log in it or below: neither of Weights & Biases (run-*.wandb; job.logger in the config) nor "
            "console output (such as a .log file); `fairchem -c CONFIG 2>&1 | tee run.log` keeps it"
        )
    found = [run for run in runs if name in (None, run)]
    if len(found) != 1:
        listed = ", ".join(sorted(found or runs)[:_SHOWN]) + (", …" if len(found or runs) > _SHOWN else "")
        wrong = f"no run '{name}'; there are" if not found else f"{len(found)} runs; {several}"
        raise ConfigError(f"{folder}: {wrong} {listed}")
    return found[0], runs[found[0]]


def read_curves(files: Sequence[Path], endings: tuple[str, ...]) -> dict[str, Curve]:
    """Curves of the scalars that a run logged.

    Args:
        files: of one run, the oldest first. Where two have the same step, the later file counts.
        endings: of the tags to read.

    Returns:
        A curve for each tag, such as `train/loss`. Errors of validation have the names that they have on fairchem 1.x,
        such as `val/forces_mae`; with several data sets for a task, `val/oc20_forces_mae`.

    Raises:
        ConfigError: a file cannot be read, or nothing was logged.
    """
    points: Points = {}
    for path in files:
        for step, logged in _records_of(path):
            for tag, value in logged.items():
                points.setdefault(tag, {})[step] = value
    points = {tag: values for tag, values in _renamed(points).items() if tag.endswith(endings)}
    if not points:
        raise ConfigError(
            f"{files[-1]}: nothing is logged in it: it is no log of fairchem, or the run has not come to its first step"
        )
    return {tag: curve_of(values) for tag, values in points.items()}


def _renamed(points: Points) -> Points:
    """The same under the tags of fairchem 1.x."""
    found = {tag: match for tag in points if (match := _VALIDATION.fullmatch(tag))}
    tasks = [(match["task"], match["metric"]) for match in found.values()]
    new = {}
    for tag, values in points.items():
        match = found.get(tag)
        if match is None:
            new[tag] = values
        else:
            of = f"{match['dataset']}_" if tasks.count((match["task"], match["metric"])) > 1 else ""
            new[f"val/{of}{match['task']}_{match['metric']}"] = values
    return new


def _records_of(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Each step at which numbers were logged, and the numbers by their tags."""
    try:
        yield from _of_wandb(path) if path.suffix == ".wandb" else _of_console(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _of_console(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    step = 0
    after = 0  # what validates runs after so many steps
    for line in path.read_text(errors="replace").splitlines():
        found, validated, done = _LOGGED.search(line), _VALIDATED.match(line), _STEPS_DONE.search(line)
        if found:
            # repr of a float that is no number is no literal.
            text = re.sub(r"\b(nan|inf)\b", r"'\1'", found[0])
            try:
                logged = {tag: float(value) for tag, value in ast.literal_eval(text).items()}
            except (ValueError, SyntaxError):
                continue
            if found["split"] == "train":
                step = int(logged.get("train/step", step))
                after = step + 1
            yield step if found["split"] == "train" else after, logged
        elif validated:
            yield after, {validated[1]: float(validated[2])}
        elif done:
            after = int(done[1])


def _of_wandb(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    try:
        for record in _whole_records(path):
            message = Record.FromString(record)
            if message.WhichOneof("record_type") != "history":
                continue
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item
            }
            logged = {
                tag: float(value)
                for tag, value in items.items()
                if isinstance(value, (int, float, str)) and _is_number(value)
            }
            yield int(logged.get("train/step", logged.get("_step", message.history.step.num))), logged
    except (DecodeError, json.JSONDecodeError):
        logging.warning("%s: damaged; what comes before counts", path)


def _is_number(value: float | str) -> bool:
    return not isinstance(value, str) or value in ("NaN", "Infinity", "-Infinity")


def _whole_records(path: Path) -> Iterator[bytes]:
    """The records of the file. It has blocks of 32 KiB, and in them parts of records: checksum, length, kind, bytes."""
    content = path.read_bytes()
    if content[:4] != b":W&B":
        raise ConfigError(f"{path}: not a file of Weights & Biases")
    at, record = _HEADER, b""
    while at + _HEADER <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # no part begins so near to the end of a block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        part = content[at + _HEADER : at + _HEADER + length]
        if kind == 0 or len(part) < length:
            logging.warning("%s: cut short; what is whole counts", path)
            return
        record = part if kind in (_WHOLE, _FIRST) else record + part
        if kind in (_WHOLE, _LAST):
            yield record
        at += _HEADER + length
