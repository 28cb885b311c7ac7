"""Where runs of the installed host left their logs."""

from __future__ import annotations

from types import ModuleType

from fairchem_scd.host import installed_major


def host_log() -> ModuleType:
    """The module with `find_run` and `read_curves` for the installed host: TensorBoard, or Weights & Biases on 2.x."""
    if installed_major() == 2:
        from fairchem_scd.commands.fairchem2 import training_log
    else:
        from fairchem_scd.commands.plot import training_log
    return training_log
