"""The shape of a backbone adapter, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from fairchem_scd.config import ConfigError


class Adapter(ABC):
    """What the package must know of one host backbone class.

    Class attributes:
        host_class: the backbone class, matched exactly: a subclass may compute something else.
        names: the names the host registers it under.
        one_piece: legacy models of backbone and heads in one, by name, that this backbone is the hydra twin of,
            each with the twin's heads.
        dropped: arguments of those models that the twin has no use for, with the only value that loses nothing.
    """

    host_class: ClassVar[type[nn.Module]]
    names: ClassVar[tuple[str, ...]]
    one_piece: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    dropped: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Raise ConfigError where the backbone's arguments rule out denoising. Called before the model is built."""
        if config.get("regress_forces", True) is False:
            raise ConfigError("model.backbone.regress_forces is false: denoising predicts vectors; set it to true")
        if config.get("otf_graph", True) is False:
            raise ConfigError(
                "model.otf_graph is false: a corrupted structure needs a graph of its own, "
                "not the data's; set otf_graph to true"
            )

    @property
    @abstractmethod
    def encoding_spec(self) -> dict[str, Any]:
        """`lmax_list`, `channels` and `bound` for a ForceEncoding of this backbone."""

    @abstractmethod
    def vector_head(self) -> nn.Module:
        """Another instance of the backbone's own force head: (data, embedding) → {name: [N, 3]}."""

    @abstractmethod
    def encoded(self, encoding: Tensor) -> AbstractContextManager[None]:
        """While entered, add `encoding` [N, Σ(lmax+1)², C] to the node embedding before the first block."""


_ADAPTERS: dict[type[nn.Module], type[Adapter]] = {}


def register_adapter(cls: type[Adapter]) -> type[Adapter]:
    """Make an adapter known for its `host_class`."""
    _ADAPTERS[cls.host_class] = cls
    return cls


def adapters() -> Sequence[type[Adapter]]:
    """All known adapters."""
    return list(_ADAPTERS.values())


def known_backbones() -> list[str]:
    """Names of the host backbones that have an adapter."""
    return sorted(name for cls in adapters() for name in cls.names)


def adapter_class(host_class: type[nn.Module]) -> type[Adapter]:
    """The adapter of a backbone class.

    Raises:
        ConfigError: there is none; the message lists the known backbones and says how to add one.
    """
    if host_class not in _ADAPTERS:
        raise ConfigError(
            f"model.backbone: no adapter for {host_class.__module__}.{host_class.__qualname__}; "
            f"known backbones: {', '.join(known_backbones())}. "
            "To add one, subclass fairchem_scd.backbones.Adapter and decorate it with register_adapter."
        )
    return _ADAPTERS[host_class]


def adapter_for(backbone: nn.Module) -> Adapter:
    """The adapter of a backbone. Raises ConfigError if there is none."""
    return adapter_class(type(backbone))(backbone)
