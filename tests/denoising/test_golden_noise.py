"""The noise of a structure is the same on both hosts: with numpy 1 and 2, on any version of Python and torch.

`python -m tests.denoising.test_golden_noise` writes the file that holds it. It must never have to be written again:
runs under way would go on with other noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fairchem_scd.denoising.corruption import corrupt
from fairchem_scd.denoising.plan import VALIDATION
from fairchem_scd.denoising.random import stream
from fairchem_scd.denoising.tasks import TaskDraw, build_tasks

GOLDEN = Path(__file__).parents[1] / "data" / "golden_noise.json"

# Ids as fairchem 1.x has them (sid/fid), contents as fairchem 2.x has them, and none.
IDS = ["17/3", "random1234567/0", "9f86d081884c7d659a2feaa0c55ad015", ""]
CASES = {
    "all atoms": {"seed": 0, "step": 1, "sigmas": (0.1,)},
    "half of the atoms, a schedule": {"seed": 7, "step": 2**40, "sigmas": (0.01, 0.1, 1.0), "ratio": 0.5},
    "validation": {"seed": 0, "step": VALIDATION, "sigmas": (0.04,)},
    "a large seed": {"seed": 2**63 + 5, "step": 3, "sigmas": (0.1,), "ratio": 0.3},
}


def drawn(case):
    natoms = torch.tensor([3, 2, 4, 3])
    movable = torch.tensor([True] * 9 + [False, True, True])
    noise = corrupt(natoms, IDS, movable, **CASES[case])
    return {"noise": noise.noise.tolist(), "mask": noise.mask.tolist(), "sigma": noise.sigma.tolist()}


def tasks_of_steps():
    """Which task the first steps of a run have; and a draw of another kind."""
    draw = TaskDraw(build_tasks({"scd": {"prob": 0.4}, "dens": {"prob": 0.3}})[0], seed=3)
    names = [task.name if (task := draw(step)) else None for step in range(40)]
    return {"tasks": names, "integer": int(stream(3, 5, "random numbers of rank 1").integers(2**63))}


@pytest.mark.parametrize("case", CASES)
def test_the_noise_is_that_of_the_file_to_the_last_bit(case):
    assert drawn(case) == json.loads(GOLDEN.read_text())[case]


def test_the_tasks_of_steps_are_those_of_the_file():
    assert tasks_of_steps() == json.loads(GOLDEN.read_text())["steps"]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({**{case: drawn(case) for case in CASES}, "steps": tasks_of_steps()}) + "\n")
