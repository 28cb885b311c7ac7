"""Fixtures for the tests of fairchem 1.x."""

from __future__ import annotations

import fairchem.core.models.equiformer_v2.equiformer_v2 as equiformer_v2
import fairchem.core.models.equiformer_v2.equiformer_v2_deprecated as equiformer_v2_legacy
import pytest
import torch
from torch import nn


class NoGrid(nn.Module):
    """Stands in for EquiformerV2's grids, which hold no parameters and take long to compile."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()


@pytest.fixture
def sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-size models in a second: no random numbers are drawn for their weights, and no grids made."""
    assert not list(equiformer_v2.SO3_Grid(1, 1).parameters())
    for module in (equiformer_v2, equiformer_v2_legacy):
        monkeypatch.setattr(module, "SO3_Grid", NoGrid)
    for draw in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, draw, lambda tensor, *args, **kwargs: tensor)
