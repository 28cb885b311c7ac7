"""Which task a step has, and the random numbers behind it: from seed and step alone."""

from __future__ import annotations

import math

from fairchem_scd.denoising.random import stream
from fairchem_scd.denoising.settings import DensSettings
from fairchem_scd.denoising.tasks import Dens, NoisyNodes, TaskDraw


def test_task_of_a_step_comes_from_seed_and_step_alone():
    tasks = {"dens": Dens(DensSettings(prob=0.3)), "noisy_nodes": NoisyNodes(NoisyNodes.Settings(prob=0.2))}
    one, other = TaskDraw(tasks, seed=5), TaskDraw(tasks, seed=5)
    forward = [one(step) for step in range(200)]
    backward = [other(step) for step in reversed(range(200))]
    assert forward == backward[::-1]
    assert [TaskDraw(tasks, seed=6)(step) for step in range(200)] != forward


def test_tasks_take_their_shares_and_exclude_each_other():
    tasks = {"dens": Dens(DensSettings(prob=0.3)), "noisy_nodes": NoisyNodes(NoisyNodes.Settings(prob=0.2))}
    n = 6000
    drawn = [TaskDraw(tasks, seed=1)(step) for step in range(n)]
    for task, share in ((tasks["dens"], 0.3), (tasks["noisy_nodes"], 0.2), (None, 0.5)):
        assert abs(drawn.count(task) / n - share) < 4 * math.sqrt(share * (1 - share) / n)
    assert all(TaskDraw({"dens": Dens(DensSettings(prob=1.0))}, seed=1)(step) is not None for step in range(500))
    assert all(TaskDraw({"dens": Dens(DensSettings(prob=0.0))}, seed=1)(step) is None for step in range(500))


def test_streams_of_different_names_differ_and_repeat():
    assert stream(0, 0, "a").random() == stream(0, 0, "a").random()
    assert len({float(stream(0, 0, str(i)).random()) for i in range(1000)}) == 1000
