"""The loss of a step through the host's own loop, against plain Python written from the formula."""

from __future__ import annotations

import copy
import math

import hydra
import pytest
import torch
from fairchem.core.units.mlip_unit.mlip_unit import compute_loss

from fairchem_scd.denoising import loss as shared
from fairchem_scd.denoising.plan import NOISE
from fairchem_scd.fairchem2.loss import tasks_of
from fairchem_scd.fairchem2.step import DenoisingStep, Step
from tests.fairchem2.support import batch_of, converted, crystal, crystals, element_references, plan_of, task

RMSD = 0.729
BLOCKS = {
    "dens": {"dens": {"prob": 1, "coefficient": 10}},
    "dens, fixed atoms too": {"dens": {"prob": 1, "all_atoms": True, "corrupt_ratio": None}},
    "scd": {"scd": {"coefficient": 5}},
    "noisy nodes": {"noisy_nodes": {"std": 0.02, "loss": "l2mae"}},
}


def loss_config(of, reduction="mean", coefficient=2.0):
    module = f"fairchem.core.modules.loss.{of}"
    return {
        "_target_": "fairchem.core.modules.loss.DDPMTLoss",
        "loss_fn": {"_target_": module},
        "reduction": reduction,
        "coefficient": coefficient,
    }


def host_tasks(*configs):
    return [hydra.utils.instantiate(config) for config in configs]


def step_of(block, batch, tasks, *, noise_seed=0):
    """A step over a batch, with outputs and noise that nobody trained."""
    model = converted(block)
    drawn = model.denoising_tasks[next(iter(block))]
    plan, corruption = plan_of(model, batch)
    step = DenoisingStep(
        task=drawn, corruption=corruption, plan=plan, objective=drawn.objective(0.0), device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(noise_seed)
    atoms, structures = len(batch.pos), len(batch.natoms)
    out = {}
    for each in tasks:
        size = {"energy": (structures,), "forces": (atoms, 3), "stress": (structures, 9)}[each.property]
        out[each.name] = {each.property: torch.randn(size, generator=generator, requires_grad=True)}
    out[NOISE] = torch.randn(atoms, 3, generator=generator, requires_grad=True)
    batch.atomic_numbers_full, batch.batch_full = batch.atomic_numbers, batch.batch
    return step, out


def of_host(step, out, batch, tasks):
    """The loss as the host sums it."""
    out = dict(out)
    if isinstance(step, DenoisingStep):
        step.receive(out, batch)
    return sum(compute_loss(tasks_of(step, tasks), out, batch).values())


def norm(p, t):
    return [math.dist(p, t)]


def squared(p, t):
    return [(a - b) ** 2 for a, b in zip(p, t, strict=True)]


def mean(items):
    return sum(items) / max(len(items), 1)


def naive_noise(step, out, of_atom):
    """L(ε/s, ε̂) of each atom that moved, item by item."""
    scale = step.objective.scale
    return [
        item
        for predicted, true, moved in zip(out[NOISE], step.corruption.noise, step.corruption.mask, strict=True)
        if moved
        for item in of_atom(predicted.tolist(), [x / scale for x in true.tolist()])
    ]


def naive_energy(out, batch, structures, coefficient=20.0):
    """The mean absolute error an atom of normalised energies without their element references."""
    references = [0.1 * (z % 7) for z in range(100)]
    items, start = [], 0
    for i, natoms in enumerate(batch.natoms.tolist()):
        numbers = batch.atomic_numbers[start : start + natoms].tolist()
        target = (batch.energy[i].item() - sum(references[z] for z in numbers)) / RMSD
        if i in structures:
            items.append(abs(out["energy"]["energy"][i].item() - target) / natoms)
        start += natoms
    return coefficient * mean(items)


@pytest.mark.parametrize("reduction", ["mean", "sum", "per_structure"])
@pytest.mark.parametrize("free_only", [True, False])
@pytest.mark.parametrize("block", [BLOCKS["dens"], BLOCKS["dens, fixed atoms too"]])
def test_a_dens_step_trains_noise_where_atoms_moved_and_forces_elsewhere(reduction, free_only, block):
    batch = batch_of([*crystals(2), crystal(7)])
    batch.fixed[-4:] = 1  # no atom of the last structure may move
    tasks = host_tasks(
        task("energy", element_references=element_references()),
        task("forces", train_on_free_atoms=free_only, loss_fn=loss_config("L2NormLoss", reduction)),
    )
    step, out = step_of(block, batch, tasks)
    rate, moved = step.objective.coefficient, step.corruption.mask.tolist()
    items: dict[int, list[float]] = {}
    for i, structure in enumerate(batch.batch.tolist()):
        if moved[i]:
            true = [x / step.objective.scale for x in step.corruption.noise[i].tolist()]
            item = rate * math.dist(out[NOISE][i].tolist(), true)
        elif free_only and batch.fixed[i]:
            continue
        else:
            true = [x / RMSD for x in batch.forces[i].tolist()]
            item = 2.0 * math.dist(out["forces"]["forces"][i].tolist(), true)
        items.setdefault(structure, []).append(item)
    every = [item for each in items.values() for item in each]
    forces = {"mean": mean(every), "sum": sum(every), "per_structure": mean([mean(each) for each in items.values()])}
    expected = naive_energy(out, batch, {0, 1, 2}) + forces[reduction]
    assert of_host(step, out, batch, tasks).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("block", "of_atom"), [("scd", squared), ("noisy nodes", norm)])
def test_beside_labels_the_noise_is_a_term_of_its_own(block, of_atom):
    batch = batch_of(crystals(3))
    tasks = host_tasks(task("energy", element_references=element_references()), task("forces"))
    step, out = step_of(BLOCKS[block], batch, tasks)
    plain = sum(compute_loss(tasks, out, copy.deepcopy(batch)).values())
    expected = plain.item() + step.objective.coefficient * mean(naive_noise(step, out, of_atom))
    assert of_host(step, out, batch, tasks).item() == pytest.approx(expected, rel=1e-5)


def test_outputs_that_dens_does_not_train_on_corrupted_structures_train_on_the_others():
    batch = batch_of([*crystals(2), crystal(7)])
    batch.fixed[:4] = 1
    tasks = host_tasks(task("energy", element_references=element_references()), task("forces"), task("stress"))
    step, out = step_of({"dens": {"prob": 1, "train_outputs": []}}, batch, tasks)
    assert step.corruption.corrupted.tolist() == [False, True, True]
    losses = compute_loss_of(step, out, batch, tasks)
    assert losses["energy"].item() == pytest.approx(naive_energy(out, batch, {0}), rel=1e-5)
    target, predicted = batch.stress.view(3, 9)[0] / RMSD, out["stress"]["stress"][0]
    assert losses["stress"].item() == pytest.approx((predicted - target).abs().mean().item(), rel=1e-5)


def test_with_a_force_task_for_each_data_set_an_atoms_noise_counts_once():
    """Each task's mean is over its own atoms, as the host has it; a second task for the same data adds nothing."""
    batch = batch_of(crystals(2))
    first, second = batch.batch == 0, batch.batch == 1
    for name, rows in (("a_forces", first), ("b_forces", second)):
        batch[name] = torch.where(rows[:, None], batch.forces, torch.inf)
    batch["again_forces"] = batch.a_forces.clone()
    names = ("a_forces", "b_forces", "again_forces")
    tasks = host_tasks(*(task(name, prop="forces") for name in names))
    step, out = step_of(BLOCKS["dens"], batch, tasks)
    found = compute_loss_of(step, out, batch, tasks)
    for name, rows in zip(names, (first, second, first), strict=True):
        items = []
        for i in rows.nonzero()[:, 0].tolist():
            if step.corruption.mask[i]:
                true = (step.corruption.noise[i] / step.objective.scale).tolist()
                counts = name != "again_forces"
                items.append(step.objective.coefficient * math.dist(out[NOISE][i].tolist(), true) if counts else 0.0)
            elif not batch.fixed[i]:
                true = (batch.forces[i] / RMSD).tolist()
                items.append(2.0 * math.dist(out[name]["forces"][i].tolist(), true))
        assert found[name].item() == pytest.approx(mean(items), rel=1e-5), name


def test_a_batch_of_which_nothing_moved_trains_as_an_ordinary_step_would():
    batch = batch_of(crystals(2))
    batch.fixed[:] = 1
    tasks = host_tasks(task("energy"), task("forces", train_on_free_atoms=False))
    for block in BLOCKS:
        if "fixed" in block:
            continue
        step, out = step_of(BLOCKS[block], batch, tasks)
        plain = sum(compute_loss(tasks, out, copy.deepcopy(batch)).values())
        found = of_host(step, out, batch, tasks)
        assert found.item() == pytest.approx(plain.item(), rel=1e-6)
        found.backward()
        assert out[NOISE].grad is not None, "its parameters need a gradient nevertheless"
        assert not out[NOISE].grad.any()


def test_an_ordinary_steps_loss_is_the_hosts_bit_for_bit():
    batch = batch_of(crystals(2))
    tasks = host_tasks(task("energy", element_references=element_references()), task("forces"), task("stress"))
    _, out = step_of(BLOCKS["scd"], batch, tasks)
    del out[NOISE]
    plain = sum(compute_loss(tasks, out, batch).values())
    assert torch.equal(of_host(Step(), out, batch, tasks), plain)


def test_the_hybrid_loss_is_the_function_of_the_first_hosts_wing(monkeypatch):
    """Both call the one in denoising/loss.py, and nothing else weighs or reduces its items."""
    calls = []
    monkeypatch.setattr(shared, "hybrid_items", lambda *args, **kwargs: calls.append(kwargs) or torch.ones(8))
    batch = batch_of([crystal(0), crystal(2)])
    tasks = host_tasks(task("forces", train_on_free_atoms=False))
    step, out = step_of(BLOCKS["dens"], batch, tasks)
    assert of_host(step, out, batch, tasks).item() == 1.0
    (given,) = calls
    assert (given["force_coefficient"], given["noise_coefficient"]) == (2.0, 10)


def compute_loss_of(step, out, batch, tasks):
    out = dict(out)
    step.receive(out, batch)
    return compute_loss(tasks_of(step, tasks), out, batch)
