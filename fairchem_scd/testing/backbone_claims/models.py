"""The models and structures that claims about a backbone are made on."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from fairchem.core.common.utils import setup_imports
from fairchem.core.models.base import HydraModel
from torch import Tensor

import fairchem_scd.fairchem1.plugin  # noqa: F401  (registers everything with the host)
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.hydra import DenoisingHydra
from fairchem_scd.testing.support import SCD, collate, slabs


@functools.cache
def _rows() -> list[Any]:
    return slabs(8)


@functools.lru_cache(maxsize=16)
def _built(arguments: str, block: str | None) -> HydraModel:
    """A model, built from the same random state at every call. Cached, since some models take long to build."""
    torch.manual_seed(0)
    if block is None:
        return HydraModel(**json.loads(arguments))
    return DenoisingHydra(denoising=json.loads(block), **json.loads(arguments))


class BackboneModels:
    """Makes the models. For the class attributes see BackboneClaims."""

    backbone: ClassVar[Mapping[str, Any]]
    heads: ClassVar[Mapping[str, Any]]
    symmetry: ClassVar[float] = 1e-4

    # --- to be overridden where a model needs it ----------------------------------------------------------------------

    def rows(self) -> list[Any]:
        """Structures with labels: eight slabs, of which the third last has an adsorbate of one atom."""
        return _rows()

    def without_chance(self) -> AbstractContextManager[Any]:
        """While entered, the model draws no random numbers in eval mode. Some models do, such as for edge frames."""
        return nullcontext()

    # --- models -------------------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _no_chance(self) -> Iterator[None]:
        setup_imports()  # fills the host's registry, as the host does at the start of any mode
        with self.without_chance():
            yield

    def arguments(self) -> dict[str, Any]:
        """Arguments of HydraModel."""
        return {
            "backbone": copy.deepcopy(dict(self.backbone)),
            "heads": copy.deepcopy(dict(self.heads)),
            "pass_through_head_outputs": True,
        }

    def plain(self) -> HydraModel:
        """The host's model."""
        return copy.deepcopy(_built(json.dumps(self.arguments()), None)).train()

    def ours(self, block: Mapping[str, Any]) -> DenoisingHydra:
        """This package's model with the same weights and the modules of a `task.denoising` block."""
        return copy.deepcopy(_built(json.dumps(self.arguments()), json.dumps(block))).train()

    def conditions_on_forces(self) -> bool:
        """Whether forces can be a condition of the backbone."""
        try:
            return bool(self.ours(SCD).adapter.encoding_spec)
        except ConfigError:
            return False

    def batch(self, count: int = 3) -> Any:
        """A batch of the first structures of `rows`."""
        return collate(self.rows()[:count])


def relative_error(expected: Tensor, found: Tensor) -> float:
    """The largest error of any element, relative to the largest element."""
    return float((found - expected).abs().max() / expected.abs().max())
