"""Which fairchem is installed, told without importing it, and how to get the other."""

from __future__ import annotations

from importlib import metadata

WINGS = {1: "fairchem_scd.fairchem1", 2: "fairchem_scd.fairchem2"}
"""The package of each wing, by the major version of fairchem-core that it is for."""

TESTED = {1: "1.10", 2: "2.24"}
"""The minor version of fairchem-core that each wing is tested with."""


def installed() -> str | None:
    """The version of the installed fairchem-core; None where there is none."""
    try:
        return metadata.version("fairchem-core")
    except metadata.PackageNotFoundError:
        return None


def installed_major() -> int | None:
    """The major version of the installed fairchem-core; None where there is none, or none that this package knows."""
    version = installed()
    major = version.partition(".")[0] if version else ""
    return int(major) if major.isdigit() and int(major) in WINGS else None


def how_to_get(major: int) -> str:
    """What to do to have fairchem of a major version, as the end of an error message."""
    if installed() is None:
        return f"install it with pip install 'fairchem-scd[fairchem{major}]'"
    clone = "uv run" if major == 1 else "uv run --project hosts/fairchem2"
    return (
        "one environment cannot hold both: make another, with pip install "
        f"'fairchem-scd[fairchem{major}]', or in a clone of this package put `{clone}` before the command"
    )


def missing(what: str, major: int) -> str:
    """An error message: `what` needs fairchem of a major version, and this is what is installed."""
    version = installed()
    here = f"fairchem-core {version} is installed" if version else "no fairchem-core is installed"
    return f"{what} is for fairchem-core {major}.x, and {here}; {how_to_get(major)}"


def is_tested(major: int) -> bool:
    """Whether the installed fairchem-core is of the minor version that this package is tested with."""
    return (installed() or "").startswith(f"{TESTED[major]}.")


def untested(major: int, reason: str) -> str:
    """An error message: something that this package takes from fairchem is not there in the installed version."""
    return (
        f"fairchem-core {installed()} has changed what fairchem-scd builds on ({reason}); it is tested with "
        f"{TESTED[major]}: pip install 'fairchem-core=={TESTED[major]}.*'"
    )
