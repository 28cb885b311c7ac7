"""Modules that moved, importable under their former names, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED = {
    "fairchem_scd.backbones": "fairchem_scd.fairchem1.backbones",
    "fairchem_scd.backbones.base": "fairchem_scd.fairchem1.backbones",
    "fairchem_scd.backbones.edge_vector": "fairchem_scd.denoising.edge_vector",
    "fairchem_scd.backbones.hooks": "fairchem_scd.denoising.hooks",
    "fairchem_scd.checkpoint": "fairchem_scd.fairchem1.checkpoint",
    "fairchem_scd.cli": "fairchem_scd.commands",
    "fairchem_scd.conditions": "fairchem_scd.denoising.conditions",
    "fairchem_scd.data": "fairchem_scd.fairchem1.data",
    "fairchem_scd.embeddings": "fairchem_scd.commands.embed.embeddings",
    "fairchem_scd.tasks": "fairchem_scd.denoising.tasks",
    "fairchem_scd.trainers": "fairchem_scd.fairchem1.trainer",
}

# Modules whose former names hold other objects than the new ones: those that code written for the former ones needs.
_AS_BEFORE = dict.fromkeys(
    ("fairchem_scd.backbones", "fairchem_scd.backbones.base"), "fairchem_scd.fairchem1.backbones.former"
)


class FormerNames(MetaPathFinder, Loader):
    """Finds a module under its former name. It holds the same objects as the module under its new name, see above."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """None: Python makes an empty module, which `exec_module` fills."""

    def exec_module(self, module: ModuleType) -> None:
        now = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {now}", DeprecationWarning, stacklevel=2)
        moved = importlib.import_module(_AS_BEFORE.get(module.__name__, now))
        module.__doc__, module.__getattr__ = moved.__doc__, lambda name: getattr(moved, name)


def install() -> None:
    """Make the former names importable. Called once, by the package's `__init__`."""
    sys.meta_path.append(FormerNames())
