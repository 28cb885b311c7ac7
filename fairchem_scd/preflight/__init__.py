"""A config tried out before its job waits in a queue: what `fairchem-scd check` does."""

from fairchem_scd.preflight.report import Report
from fairchem_scd.preflight.run import preflight

__all__ = ["Report", "preflight"]
