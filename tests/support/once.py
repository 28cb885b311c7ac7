"""What models of fairchem 1.x compute whenever they are built, always with the same result, is computed once.

These are functions of a few numbers that generate code or simplify formulas. Without this, most of the time that a tiny
EquiformerV2, GemNet-OC or DimeNet++ takes to build goes into them, and the tests build many hundreds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from e3nn.o3 import _s2grid
from fairchem.core.models.gemnet.layers import spherical_basis as gemnet
from fairchem.core.models.gemnet_oc.layers import basis_utils as gemnet_oc
from torch_geometric.nn.models import dimenet_utils as dimenet


def _compute_once(module: ModuleType, name: str, copied: Callable[[Any], Any]) -> None:
    function = getattr(module, name)

    @functools.cache
    def known(default: torch.dtype, /, *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    def once(*arguments: Any, **options: Any) -> Any:
        return copied(known(torch.get_default_dtype(), *arguments, **options))

    setattr(module, name, once)


def _tensors(values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.clone() for value in values)


def _formulas(rows: list[list[Any]]) -> list[list[Any]]:
    return [list(row) for row in rows]


_compute_once(_s2grid, "spherical_harmonics_s2_grid", _tensors)
_compute_once(gemnet, "real_sph_harm", _formulas)
_compute_once(gemnet_oc, "real_sph_harm", _formulas)
_compute_once(dimenet, "real_sph_harm", _formulas)
_compute_once(dimenet, "bessel_basis", _formulas)
