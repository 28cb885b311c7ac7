"""Checks that the data files of a config are there and complete, before training opens them."""

from __future__ import annotations

import glob
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lmdb

from fairchem_scd.errors import ConfigError, DataError

_LMDB = ("lmdb", "single_point_lmdb", "trajectory_lmdb", "oc22_lmdb", "oc20_md_lmdb", "dens_lmdb")
_ASE = ("ase_db", "ase_lmdb", "ase_read", "ase_read_multi")


def check_source(key: str, dataset: Mapping[str, Any], train: Mapping[str, Any]) -> None:
    """Check that the data of a split is there, and that its LMDB files are complete.

    Args:
        key: where the split stands in the config.
        dataset: its block.
        train: the block of the training split, whose format the others inherit.

    Raises:
        ConfigError: names the key and path, and says how to get the data.
        DataError: names an LMDB file that was cut short.
    """
    if "src" not in dataset:
        return
    src, kind = dataset["src"], dataset.get("format", train.get("format", "lmdb"))
    if kind == "oc22_lmdb" and (dataset.get("lin_ref") or train.get("lin_ref")):
        logging.warning(
            "%s.lin_ref: the host's oc22_lmdb reads it and then drops it; what subtracts references is "
            "dataset.train.transforms.element_references.energy.file (see configs/dens_oc22.yml)",
            key,
        )
    if not src:
        raise ConfigError(f"{key}.src: empty; it names the data. {_how_to_get(kind)}")
    for path in [src] if isinstance(src, (str, Path)) else src:
        if kind in _LMDB:
            found = Path(path).is_file() or any(Path(path).glob("*.lmdb"))
        elif kind in _ASE:
            found = Path(path).exists() or bool(glob.glob(str(path))) or "://" in str(path)
        else:
            continue
        if not found:
            what = "holds no *.lmdb" if Path(path).is_dir() else "no such file or folder"
            raise ConfigError(f"{key}.src: {path}: {what}. {_how_to_get(kind)}")
        for file in _lmdb_files(Path(path)):
            check_whole(key, file)


def _lmdb_files(path: Path) -> list[Path]:
    """The files of LMDB's format, fairchem's `.aselmdb` among them, that a host dataset opens under a path."""
    if path.is_dir():
        return sorted(file for pattern in ("*.lmdb", "*.aselmdb") for file in path.glob(pattern))
    found = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path))))
    return [file for file in found if file.suffix in (".lmdb", ".aselmdb")]


def check_whole(key: str, file: Path) -> None:
    """Check that an LMDB file was not cut short. Reading beyond its end would kill the process (SIGBUS) silently.

    Args:
        key: of the split in the config.
        file: of LMDB's format, whatever its name.

    Raises:
        DataError: it was cut short, or it is no LMDB file.
    """
    size = file.stat().st_size
    try:
        with lmdb.open(str(file), subdir=False, readonly=True, lock=False, create=False) as env:
            needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    except lmdb.Error as error:
        raise DataError(f"{key}.src: {file} ({size} bytes) is no whole LMDB file: {error}") from error
    # Where rows were deleted while it was written, a file may lack unused pages at its end. That is rare, and only
    # reading shows it.
    if size < needed and not _can_be_read(file):
        raise DataError(f"{key}.src: {file} was cut short: it has {size} of {needed} bytes; copy or download it again")


_READ = """
import lmdb, sys
with lmdb.open(sys.argv[1], subdir=False, readonly=True, lock=False) as env, env.begin(buffers=True) as view:
    for key, value in view.cursor():
        bytes(value[::1024]), bytes(value[-1:])
"""


def _can_be_read(file: Path) -> bool:
    """Whether all of an LMDB file can be read. It is read in a process of its own, which is killed where it cannot."""
    return subprocess.run([sys.executable, "-c", _READ, str(file)], capture_output=True).returncode == 0


def _how_to_get(kind: str) -> str:
    if kind in _ASE:
        return "ASE databases are written with ase.db; docs/data.md lists the formats."
    return (
        "docs/data.md says how to get OC20 and OC22 as LMDBs (the host's download_data); "
        "`format: emt_slabs` makes sample data by itself."
    )
