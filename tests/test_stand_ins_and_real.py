"""Backbones and the whole suite give the same with the stand-ins and with the real torch-scatter and torch-sparse."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.models.base import HydraModel
from torch import Tensor

from benchmarks import stand_ins as extensions
from benchmarks.common import BACKBONES, hydra
from fairchem_scd.testing import collate, crystal, slabs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STAND_INS = extensions.stand_ins()
# What each backbone has to call for its test to say something; of a rank-two head and a sum of energies, scatter.
CALLED = {
    "escn": set(),
    "esen": set(),
    "esen_conservative": set(),
    "painn": {"scatter", "segment_coo"},
    "gemnet_t": {"scatter", "SparseTensor", "rows"},
    "gemnet_t_conservative": {"scatter", "SparseTensor", "rows"},
    "gemnet_oc": {"segment_coo", "SparseTensor", "rows"},
    "dimenetplusplus": {"scatter", "SparseTensor", "rows"},
}


def backbone_with_all_heads(name: str) -> HydraModel:
    model = hydra(name, layers=2, channels=16, lmax=2, radius=6.0, neighbors=12)
    del model["name"]
    if name == "equiformer_v2":
        model["heads"]["stress"] = {"module": "rank2_symmetric_head", "output_name": "stress"}
    torch.manual_seed(0)
    return HydraModel(**model)


def step(model: HydraModel, batch: Any, names: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and the gradient of every parameter, where the host calls these."""
    model.zero_grad()
    with extensions.host_with(names):
        torch.manual_seed(1)  # of the random edge frames
        out = {name: value for name, value in model(batch.clone()).items() if torch.is_tensor(value)}
        generator = torch.Generator().manual_seed(2)
        sum((value * torch.randn(value.shape, generator=generator)).sum() for value in out.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in out.items()} | gradients


def noting(calls: list[tuple[str, tuple, dict]]) -> dict[str, Any]:
    """The stand-ins, which note what they are called with."""

    def noted(name: str, function: Callable) -> Callable:
        def call(*args: Any, **more: Any) -> Any:
            calls.append((name, args, more))
            return function(*args, **more)

        return call

    class Noting(STAND_INS.torch_sparse.SparseTensor):
        def __init__(self, **more: Any) -> None:
            super().__init__(**more)
            if "is_sorted" not in more:
                calls.append(("SparseTensor", (), more))

        def __getitem__(self, rows: Tensor) -> Any:
            row, col, value = self.coo()
            entries = {"row": row, "col": col, "value": value, "sparse_sizes": self.sparse_sizes()}
            calls.append(("rows", (rows,), entries))
            return super().__getitem__(rows)

    names = STAND_INS.host_names()
    return {name: noted(name, function) for name, function in names.items()} | {"SparseTensor": Noting}


def replayed(call: tuple[str, tuple, dict], names: dict[str, Any]) -> list[Tensor]:
    """What a call gives, and the gradient of the values that it reduces."""
    name, args, more = call
    if name in ("SparseTensor", "rows"):
        made = names["SparseTensor"](**more)
        return list((made if name == "SparseTensor" else made[args[0]]).coo())
    values = args[0].detach()
    if not (values.is_floating_point() and name != "broadcast"):
        return [names[name](values, *args[1:], **more)]
    values.requires_grad_()
    result = names[name](values, *args[1:], **more)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(result.shape, generator=generator, dtype=result.dtype)
    return [result.detach(), *torch.autograd.grad(result, values, direction)]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("structures", ["slabs", "crystals"])
def test_what_a_backbone_reduces_is_what_the_real_packages_make_of_it(name, structures):
    real = extensions.real()
    rows = slabs(3) if structures == "slabs" else [crystal(), crystal((1, 2, 1))]
    model, batch = backbone_with_all_heads(name), collate(rows)
    calls: list[tuple[str, tuple, dict]] = []
    ours = step(model, batch, noting(calls))
    theirs = step(model, batch, real.host_names())
    assert ours.keys() == theirs.keys()
    assert any(value.any() for value in ours.values())
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), f"{key}: {(ours[key] - value).abs().max()} of {value.abs().max()}"
    assert {call[0] for call in calls} >= CALLED.get(name, {"scatter"})
    for call in calls:
        for mine, real_one in zip(
            replayed(call, STAND_INS.host_names()), replayed(call, real.host_names()), strict=True
        ):
            assert mine.dtype == real_one.dtype
            assert torch.equal(mine, real_one), call[0]


def test_the_suite_passes_with_the_other_packages():
    """With the real ones where the stand-ins are installed, and the other way round."""
    if extensions.installed() == STAND_INS:
        folders, version = [extensions.BUILT], extensions.real().torch_scatter.__version__
    else:
        folders, version = [extensions.HERE / "torch-scatter", extensions.HERE / "torch-sparse"], "2.1.2+standin"
    paths = [str(folder) for folder in folders] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    asked = "import torch_scatter; print(torch_scatter.__version__)"
    found = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == version
    suite = subprocess.run([sys.executable, "-m", "pytest"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert suite.returncode == 0, suite.stdout[-5000:]
