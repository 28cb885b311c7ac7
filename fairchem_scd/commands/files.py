"""Output files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairchem_scd.errors import ConfigError


def check_output(path: str | Path, *, force: bool = False) -> Path:
    """Check that a file can be written. Called before the work whose result it will hold.

    Args:
        path: of the file.
        force: the file may exist already, and will be overwritten.

    Raises:
        ConfigError: it exists, it is a folder, or its folder is missing or cannot be written to.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file in it")
    if path.exists() and not force:
        raise ConfigError(f"{path}: exists already; --force overwrites it")
    if not folder.is_dir():
        raise ConfigError(f"{path}: there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{path}: cannot write to {folder} ({error.strerror})") from error
    return path


@contextmanager
def whole_file(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """While entered, a temporary path to write to. At the end the file is forced to the disk and gets its own name.

    Raises:
        ConfigError: as `check_output`, or the disk is full. A file that was there before is then still there.
    """
    path = check_output(path, force=force)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o666 & ~_umask())  # mkstemp lets only the user read the file
        part.replace(path)
    except Exception as error:
        # On a full disk some libraries raise errors of their own, which do not say so.
        if isinstance(error, OSError) or (not isinstance(error, ConfigError) and _is_full(path.parent)):
            reason = getattr(error, "strerror", None) or f"the disk is full, or nearly: {error}"
            raise ConfigError(f"{path}: could not be written ({reason}); nothing was changed") from error
        raise
    finally:
        part.unlink(missing_ok=True)


def _is_full(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**20))
            probe.flush()
    except OSError:
        return True
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
