"""Steps on two ranks: what one rank would do with both batches."""

from __future__ import annotations

import copy
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch
from fairchem.core.datasets.mt_concat_dataset import ConcatDataset
from torch.utils.data import DataLoader
from torchtnt.framework import train

from fairchem_scd.errors import DataError
from fairchem_scd.fairchem2.model import unwrapped
from tests.fairchem2.support import (
    batch_of,
    crystal,
    crystals,
    inner,
    model_config,
    plain_state,
    row,
    stirred,
    tasks_config,
    train_on,
    unit_of,
    validate,
)

SGD = partial(torch.optim.SGD, lr=0.05)
BLOCKS = {"scd": {"scd": {"prob": 1}}, "dens": {"dens": {"prob": 1}}, "noisy nodes": {"noisy_nodes": {}}}
KINDS = {"scd": {"prob": 0.4}, "dens": {"prob": 0.3}}
FAILING = {"a disk fails": {"scd": {}}, "a disk fails, skip": {"scd": {}, "on_bad_data": "skip"}}
CONSERVATIVE = {"direct": False, "stress": True, "experts": 2, "moe_dropout": 0.3, "activation_checkpointing": True}

_PATIENCE = timedelta(seconds=120)
"""A rank that waits longer for the other ends with an error."""


def batches(rank):
    """A rank's batches; the ranks' have different sizes, and in one of them nothing moves on the second rank."""
    made = [batch_of(crystals(2 + rank, 10 * rank + seed)) for seed in range(3)]
    if rank == 1:
        made[1].fixed[:] = 1
    return made


def judged(data):
    """What is logged of a validation on batches: in pre-training, and beside labels."""
    alone = {"tasks": [], "model": model_config(heads={})}
    found = []
    for block, how in (({}, alone), ({"judge_condition": True}, {"model": model_config(**CONSERVATIVE)})):
        unit = unit_of({"scd": block}, **how)
        model = stirred(unwrapped(unit.eval_unit.model))
        with torch.no_grad():  # so that it listens
            for parameter in model.denoising["scd"].parameters():
                parameter *= 8
        logged = validate(unit, data)
        found.append({name: value for name, value in logged.items() if "condition" in name or "pos_mae" in name})
    return found


def weights(unit):
    return {name: value.clone() for name, value in inner(unit).state_dict().items() if value.is_floating_point()}


class Vanishing(list):
    """Rows of which no more than `reads` can be read, as of a disk that fails."""

    reads = 10**9

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise OSError("gone")
        return super().__getitem__(index)


class Pairs(list):
    """The rows of each batch, with what the host asks of a sampler."""

    def set_epoch_and_start_iteration(self, epoch, start):
        assert start == 0


def of_a_failing_disk(block, rank):
    """Train on two ranks; in the second step, rank 1 can read nothing any more. The error, and the steps that were."""
    unit, rows = unit_of(block), Vanishing([row(crystal(seed)) for seed in range(8)])
    if rank == 1:
        rows.reads = 2 * len(rows) + 2  # before training, and the first batch
    data = ConcatDataset({"mo.train": rows}, {"type": "temperature", "temperature": 1.0})
    collate = partial(atomicdata_list_to_batch, exclude_keys=[])
    loader = DataLoader(data, batch_sampler=Pairs([[0, 1], [2, 3], [4, 5]]), collate_fn=collate)
    try:
        train(unit, loader, max_epochs=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}", unit.train_progress.num_steps_completed
    return "none", unit.train_progress.num_steps_completed


def _on_rank(rank, folder):
    """All that the claims below are about, on one of two ranks."""
    torch.set_num_threads(1)
    distutils.assign_device_for_local_rank(cpu=True, local_rank=rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=_PATIENCE)
    found = {}
    for name, block in BLOCKS.items():
        unit = unit_of(block, optimizer_fn=SGD)
        train_on(unit, batches(rank)[:2])
        found[name] = weights(unit)
    unit = unit_of(KINDS, model=model_config(**CONSERVATIVE), tasks=tasks_config(stress=True))
    drawn = [getattr(unit.draw_task(step), "name", None) for step in range(6)]
    train_on(unit, batches(rank) * 2)
    found["kinds"], found["drawn"] = weights(unit), drawn
    pretraining = unit_of({"scd": {}}, model=model_config(heads={}), tasks=[])
    train_on(pretraining, batches(rank))
    found["pre-training"] = weights(pretraining)
    noise = pretraining._corrupted(batches(0)[0], pretraining.draw_task(0), 5).corruption.noise
    found["noise"] = {"same batch": noise}
    structures = crystals(5)  # the host's sampler fills up the last rank's share with one that the first has, too
    shares = ([structures[:2], structures[2:3]], [structures[3:], structures[:1]])
    found["judged"] = judged([batch_of(share) for share in shares[rank]])
    before, bad = plain_state(unit)["model"], batches(rank)[:1]
    bad[0].bad_data = ["mo.train, row 7: broken" if rank == 1 else ""] * len(bad[0].natoms)
    try:
        train_on(unit, bad)
        found["error"] = "none"
    except DataError as error:
        found["error"] = str(error)
    found["untouched"] = all(torch.equal(before[name], value) for name, value in plain_state(unit)["model"].items())
    for name, block in FAILING.items():
        found[name] = of_a_failing_disk(block, rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    """What each of two ranks found."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_rank, (folder,), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", BLOCKS)
def test_two_ranks_train_what_one_would_on_both_batches(ranks, name):
    """To the precision to which the host's random frames of edges, which differ, leave the model as it is."""
    unit = unit_of(BLOCKS[name], optimizer_fn=SGD)
    start = weights(unit)
    train_on(unit, [joined(*pair) for pair in zip(batches(0)[:2], batches(1)[:2], strict=True)])
    expected = weights(unit)
    moved = [key for key in start if not torch.equal(start[key], expected[key])]
    assert any("noise_head" in key for key in moved)
    for key in moved:
        step = (expected[key] - start[key]).abs().max()
        assert (ranks[0][name][key] - expected[key]).abs().max() < 1e-3 * step + 1e-7, key


def test_all_kinds_of_steps_follow_each_other_and_ranks_stay_equal(ranks):
    assert {"scd", "dens", None} <= set(ranks[0]["drawn"])
    assert ranks[0]["drawn"] == ranks[1]["drawn"]
    for key in (*BLOCKS, "kinds", "pre-training", "noise"):
        assert ranks[0][key].keys() == ranks[1][key].keys()
        assert all(torch.equal(value, ranks[1][key][name]) for name, value in ranks[0][key].items()), key


def test_two_ranks_judge_a_condition_as_one_does(ranks):
    for kind, expected in enumerate(judged([batch_of(crystals(5))])):
        assert len(expected) == 10
        assert len({value for name, value in expected.items() if "pos_mae" in name}) == 4
        assert ranks[0]["judged"][kind] == ranks[1]["judged"][kind]
        assert ranks[0]["judged"][kind] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_bad_row_on_one_rank_ends_all_before_it_changes_the_weights(ranks):
    for found in ranks:
        assert found["error"].startswith("mo.train, row 7: broken. With runner.train_eval_unit.denoising.on_bad_data")
        assert found["untouched"]


@pytest.mark.parametrize("name", FAILING)
def test_all_ranks_end_in_the_same_step_where_one_can_read_nothing_any_more(ranks, name):
    message = "DataError: 8 rows one after the other cannot be trained on; the first: mo.train, row 2: cannot be read"
    for found in ranks:
        error, steps = found[name]
        assert error == f"{message}: OSError: gone"
        assert steps == 1


def joined(first, second):
    """Two batches as one."""
    rows = [*first.batch_to_atomicdata_list(), *second.batch_to_atomicdata_list()]
    return atomicdata_list_to_batch([copy.deepcopy(row) for row in rows])
