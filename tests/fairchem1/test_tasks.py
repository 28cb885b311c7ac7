"""Every claim about a task, for each of this package's tasks."""

from __future__ import annotations

from fairchem_scd.denoising.task_registry import own_task_classes
from fairchem_scd.testing import TaskClaims


class TestDens(TaskClaims):
    block = {"dens": {"num_steps": 3, "std_low": 0.01, "std_high": 0.1, "sigma_encoding": True}}


class TestScd(TaskClaims):
    block = {"scd": {"condition": ["self", "forces"], "noise_scale": "running"}}


class TestScdOfSubsets(TaskClaims):
    block = {"scd": {"embed_tags": [0, 1], "denoise_tags": [0, 1, 2]}}


class TestNoisyNodes(TaskClaims):
    block = {"noisy_nodes": {}}


def test_every_task_of_this_package_is_claimed():
    claimed = {name for cls in TaskClaims.__subclasses__() if cls.__module__ == __name__ for name in cls.block}
    assert claimed == set(own_task_classes())
