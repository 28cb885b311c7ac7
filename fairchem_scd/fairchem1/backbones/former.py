"""`fairchem_scd.backbones` as it was before its modules moved, for adapters that were written then.

An adapter that subclasses this `Adapter` and is registered by this `register_adapter` may still use the former names of
its members, and describe legacy models in class attributes. Nothing in the package itself imports this module.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

from fairchem_scd.denoising import adapter as registry
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import (
    DimeNetPlusPlusAdapter,
    EquiformerV2Adapter,
    ESCNAdapter,
    ESENAdapter,
    Fairchem1Adapter,
    GemNetOCAdapter,
    GemNetTAdapter,
    PaiNNAdapter,
    adapter_class,
    adapter_for,
    adapters,
    known_backbones,
)
from fairchem_scd.fairchem1.legacy import HYDRA
from fairchem_scd.fairchem1.legacy import hydra_key as twin_key
from fairchem_scd.fairchem1.legacy import to_hydra as modernise
from fairchem_scd.fairchem1.legacy_models import LEGACY_MODELS, LegacyModel

__all__ = [
    "HYDRA",
    "Adapter",
    "DimeNetPlusPlusAdapter",
    "ESCNAdapter",
    "ESENAdapter",
    "EquiformerV2Adapter",
    "GemNetOCAdapter",
    "GemNetTAdapter",
    "PaiNNAdapter",
    "adapter_class",
    "adapter_for",
    "adapters",
    "known_backbones",
    "modernise",
    "register_adapter",
    "twin_key",
]

_RENAMED = {
    "energy_free": "skip_energy_readout",
    "lone_structures": "runs_lone_structures",
    "cannot_tell_forces": "cannot_condition_on_forces",
}
_LEGACY = ("one_piece", "moved", "twin_heads", "dropped")


class Adapter(Fairchem1Adapter):
    """The base class of adapters, with the former names of its members."""

    one_piece: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    moved: ClassVar[Mapping[str, str]] = {"energy_block": "energy", "force_block": "forces"}
    dropped: ClassVar[Mapping[str, Any]] = {}
    lone_structures: ClassVar[bool] = Fairchem1Adapter.runs_lone_structures

    def energy_free(self) -> AbstractContextManager[None]:
        return super().skip_energy_readout()

    @classmethod
    def cannot_tell_forces(cls) -> ConfigError | None:
        return super().cannot_condition_on_forces()

    @classmethod
    def twin_heads(cls, name: str, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return copy.deepcopy(dict(cls.one_piece[name]))


def register_adapter(cls: type[registry.Adapter]) -> type[registry.Adapter]:
    """Make an adapter known for its `host_class`, and its legacy models to the table of them.

    Raises:
        TypeError: it uses former names without being a subclass of the `Adapter` of this module.
    """
    used = [name for name in (*_RENAMED, *_LEGACY) if _overridden(cls, name)]
    if used and not issubclass(cls, Adapter):
        raise TypeError(
            f"{', '.join(f'{cls.__name__}.{name}' for name in used)}: former names of an adapter's members. "
            f"{'; '.join(f'{former} is now {now}' for former, now in _RENAMED.items())}; {', '.join(_LEGACY)} are now "
            "entries of fairchem_scd.fairchem1.legacy_models.LEGACY_MODELS"
        )
    for former in used:
        now = _RENAMED.get(former, "an entry of fairchem_scd.fairchem1.legacy_models.LEGACY_MODELS")
        warnings.warn(f"{cls.__name__}.{former} is now {now}", DeprecationWarning, stacklevel=2)
        if former in _RENAMED:
            setattr(cls, now, inspect.getattr_static(cls, former))
    for name in getattr(cls, "one_piece", ()):
        heads = partial(cls.twin_heads, name)
        LEGACY_MODELS[name] = LegacyModel(cls.names[0], heads, moved=cls.moved, dropped=cls.dropped)
    return registry.register_adapter(cls)


def _overridden(cls: type[registry.Adapter], name: str) -> bool:
    found = inspect.getattr_static(cls, name, None)
    return found is not inspect.getattr_static(Adapter, name, None) and found is not None
