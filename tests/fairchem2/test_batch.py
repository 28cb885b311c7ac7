"""The host's batch as tasks see it and as passes see it."""

from __future__ import annotations

import copy
from argparse import Namespace

import hydra
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from omegaconf import OmegaConf

from fairchem_scd.denoising.plan import Pass
from fairchem_scd.fairchem2.batch import identities, structures_of, view_of
from tests.fairchem2.support import (
    batch_of,
    cluster,
    converted,
    crystal,
    crystals,
    model_config,
    plan_of,
    run_config,
    write,
)

NO_TASKS = ()


# --- views ------------------------------------------------------------------------------------------------------------


def test_no_pass_sees_what_another_one_wrote():
    model = converted({"scd": {}}, model_config(direct=False, stress=True, experts=2))
    batch = batch_of(crystals(2))
    before, keys = copy.deepcopy(batch), set(batch.keys())
    plan, _ = plan_of(model, batch)
    seen = []
    forward = model.backbone.forward

    def spied(view):
        seen.append((view, set(view.keys())))
        return forward(view)

    model.backbone.forward = spied
    model(batch, plan)
    (first, keys_of_first), (second, keys_of_second) = seen
    assert keys_of_first == keys_of_second == keys
    assert first.scatter_target is not second.scatter_target
    assert set(batch.keys()) - keys == {"batch_full", "atomic_numbers_full"}, "which the host's loss reads"
    for key in keys:
        tensor = isinstance(batch[key], torch.Tensor)
        assert torch.equal(batch[key], before[key]) if tensor else batch[key] == before[key], key
    assert not batch.pos.requires_grad
    assert not batch.cell.requires_grad


def test_a_batch_that_a_plain_pass_has_seen_gives_the_same_views():
    model = converted({"scd": {}}, model_config())
    batch = batch_of(crystals(2))
    plan, _ = plan_of(model, batch)
    fresh = view_of(batch, plan.passes[1])
    model(batch)
    used = view_of(batch, plan.passes[1])
    assert "scatter_target" in batch
    assert "scatter_target" not in used
    assert torch.equal(fresh.pos, used.pos)


# --- edges of moved atoms ---------------------------------------------------------------------------------------------


def edges(backbone, view):
    """The sorted distances of the edges that the host's search finds."""
    return np.sort(backbone._generate_graph(view)["edge_distance"].detach().numpy())


def expected_edges(atoms, pos, pbc, cutoff):
    """The same by another program's search, which does not ask where in the cell atoms are."""
    moved = Atoms(atoms.numbers, positions=pos, cell=atoms.cell.array, pbc=pbc)
    return np.sort(neighbor_list("d", moved, cutoff))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False)])
def test_atoms_that_noise_moves_out_of_their_cell_keep_their_edges(version, always, pbc):
    atoms, cutoff = crystal(3, (1, 1, 3)), 3.5
    assert cutoff < min(atoms.cell.volume / np.linalg.norm(atoms.cell.reciprocal() * atoms.cell.volume, axis=1))
    config = model_config(radius_pbc_version=version, always_use_pbc=always, max_neighbors=300, cutoff=cutoff)
    model = converted({"noisy_nodes": {"std": 2.0}}, config)
    atoms.pbc = pbc
    if not pbc[2]:
        atoms.center(vacuum=6, axis=2)
    batch = batch_of([atoms])
    plan, corruption = plan_of(model, batch)
    (noisy,) = plan.passes
    periodic = (True, True, True) if always and version == 1 else pbc
    noise_alone = batch.pos + corruption.noise
    expected = expected_edges(atoms, noise_alone.numpy(), periodic, cutoff)
    found = edges(model.backbone, view_of(batch, noisy))
    assert len(found) == len(expected)
    assert np.allclose(found, expected, atol=1e-4)
    unwrapped = edges(model.backbone, view_of(batch, Pass(noise_alone)))
    assert len(unwrapped) != len(expected), "the noise was to move atoms out of reach of the host's search"


# --- what tasks see ---------------------------------------------------------------------------------------------------


def test_a_structures_name_and_noise_do_not_depend_on_the_batch():
    model = converted({"scd": {}}, model_config())
    atoms = [crystal(0), crystal(1), crystal(2, (1, 1, 2)), cluster(0)]
    assert batch_of(atoms).sid == [""] * 4, "the host was to give no names"
    alone = []
    for each in atoms:
        (name,) = identities(batch_of([each]))
        alone.append((name, plan_of(model, batch_of([each]))[1].noise))
    assert len({name for name, _ in alone}) == 4
    order = [2, 0, 3, 1]
    batch = batch_of([atoms[i] for i in order])
    assert identities(batch) == [alone[i][0] for i in order]
    assert torch.equal(plan_of(model, batch)[1].noise, torch.cat([alone[i][1] for i in order]))
    same_size = [alone[i][1] for i in (0, 1)]
    assert not torch.allclose(*same_size)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_structures_name_does_not_depend_on_the_loaders_processes(tmp_path, workers):
    write(tmp_path, "train", crystals(6))
    names = []
    for count in (0, workers):
        config = OmegaConf.create(run_config(tmp_path)["runner"]["train_dataloader"])
        config.num_workers = count
        loader = hydra.utils.instantiate(config)
        names.append([identities(batch) for batch in loader])
    assert names[0] == names[1]
    assert len({name for batch in names[0] for name in batch}) == 6


def test_labels_under_the_names_of_several_data_sets_are_one_label():
    """As UMA's configs have them: each data set with tasks of its own, and infinity where a structure has no label."""
    first, second = batch_of([crystal(0)], dataset="a"), batch_of([crystal(1)], dataset="b")
    batch = batch_of([crystal(0), crystal(1)])
    batch.a_forces = torch.cat([first.forces, torch.full_like(second.forces, torch.inf)])
    batch.b_forces = torch.cat([torch.full_like(first.forces, torch.inf), second.forces])
    tasks = [Namespace(name=name, property=name[2:]) for name in ("a_forces", "b_forces", "a_energy")]
    assert torch.equal(structures_of(batch, batch.pbc, tasks).forces, batch.forces)
    assert structures_of(batch, batch.pbc, tasks).stress.isfinite().all(), "no task trains it: it is under its own name"
    assert structures_of(batch_of([cluster(0)]), batch_of([cluster(0)]).pbc, NO_TASKS).stress is None


def test_a_structure_without_force_labels_is_left_alone_by_dens_and_told_nothing_by_scd():
    batch = batch_of([crystal(0), crystal(1)])
    batch.forces[4:] = torch.inf
    model = converted({"dens": {"prob": 0.5}, "scd": {"condition": ["self", "forces"]}}, model_config())
    plan, corruption = plan_of(model, batch, "dens")
    assert corruption.corrupted.tolist() == [True, False]
    plan, corruption = plan_of(model, batch, "scd")
    assert corruption.corrupted.tolist() == [True, True]
    _, told, _ = plan.passes[1].encoding
    assert told[1:4].all()
    assert not told[4:].any()
    assert all(value.isfinite().all() for out in model(batch, plan).values() for value in _tensors(out))


def _tensors(out):
    return [out] if isinstance(out, torch.Tensor) else [value for each in out.values() for value in _tensors(each)]
