"""Corrupted atoms that leave their cell: no edge of the host's graph is lost, and molecules stay in one piece."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from ase import Atoms
from fairchem.core.preprocessing import AtomsToGraphs

from fairchem_scd.fairchem1.hydra import view_of
from fairchem_scd.testing import collate, make_trainer
from tests.support.configs import pretraining, tiny_config
from tests.support.models import EQUIFORMER_V2

CUTOFF = EQUIFORMER_V2["max_radius"]
LEGACY = {"name": "equiformer_v2", **{key: value for key, value in EQUIFORMER_V2.items() if key != "model"}}
BULK, SLAB, MOLECULE = (True, True, True), (True, True, False), (False, False, False)
NOISE = {"std": 0.4, "prob": 1.0}


def crystal(number, pbc=BULK):
    """Atoms close to the faces of a skewed cell whose heights are the cutoff, or twice it, and a little more."""
    generator = torch.Generator().manual_seed(number)
    cell = torch.tensor([[CUTOFF + 0.02, 0.0, 0.0], [0.0, 2 * CUTOFF + 0.02, 0.0], [0.3, 0.0, CUTOFF + 0.02]])
    fractional = torch.rand(10, 3, generator=generator)
    fractional[:, 0] = 0.04 * torch.rand(10, generator=generator)
    fractional[5:, 0] = 0.96 + fractional[5:, 0]
    atoms = Atoms("Cu5Ag5", positions=(fractional @ cell).numpy(), cell=cell.numpy(), pbc=pbc)
    row = AtomsToGraphs(r_energy=False, r_forces=False, r_edges=False, r_pbc=True).convert(atoms)
    row.fixed = torch.zeros(10)
    row.energy, row.forces = 0.0, torch.randn(10, 3, generator=generator)
    row.sid, row.fid, row.natoms = number, 0, 10
    return row


def trainer_of(folder, run, denoising, legacy=False, **backbone):
    config = tiny_config(folder, denoising=denoising)
    if legacy:
        config["model"] = {**LEGACY, **backbone}
    else:
        config["model"]["backbone"].update(backbone)
    trainer = make_trainer(config, run)
    trainer.model.train()
    return trainer


def sorted_edges(receivers, neighbours, vectors):
    """Edges in an order of their own: [E, 2] atoms, and [E, 3] vectors between them, Å."""
    distance = vectors.norm(dim=1).numpy()
    order = np.lexsort((distance, neighbours.numpy(), receivers.numpy()))
    return torch.stack([receivers, neighbours], dim=1)[order], vectors[order]


def edges_of_host(trainer, batch, noisy, pos):
    """The edges of the host's own graph of the view that a pass has, with positions `pos`."""
    view = view_of(batch, noisy)
    view.pos = pos
    graph = trainer._unwrapped_model.backbone.generate_graph(view)
    return sorted_edges(graph.edge_index[1], graph.edge_index[0], graph.edge_distance_vec)


def edges_of_search(batch, pos, pbc):
    """All pairs within the cutoff, of atoms anywhere: every image of a large neighbourhood is tried."""
    receivers, neighbours, found = [], [], []
    for b in range(len(batch.natoms)):
        atoms = (batch.batch == b).nonzero()[:, 0]
        for image in product(*(range(-4, 5) if repeats else (0,) for repeats in pbc[b])):
            shift = torch.tensor(image, dtype=pos.dtype) @ batch.cell[b]
            vectors = pos[atoms][None] + shift - pos[atoms][:, None]
            distance = vectors.norm(dim=-1)
            assert (distance - CUTOFF).abs().min() > 1e-5, "a pair at the very cutoff; choose another seed"
            i, j = ((distance < CUTOFF) & (distance > 0.01)).nonzero().T
            receivers.append(atoms[i])
            neighbours.append(atoms[j])
            found.append(vectors[i, j])
    return sorted_edges(torch.cat(receivers), torch.cat(neighbours), torch.cat(found))


def step_on(trainer, batch):
    """Positions as a plain sum with the noise, and the pass that predicts the noise."""
    step = trainer._begin(batch)
    return batch.pos + step.corruption.noise, step.plan.passes[-1]


@pytest.mark.parametrize(("block", "legacy"), [("dens", False), ("dens", True), ("scd", False), ("noisy_nodes", False)])
@pytest.mark.parametrize("marked", [True, False], ids=["pbc in the data", "no pbc in the data"])
def test_no_edge_is_lost_where_noise_moves_atoms_out_of_the_cell(block, legacy, marked, data, tmp_path):
    trainer = trainer_of(data, tmp_path, {block: NOISE}, legacy)
    rows = [crystal(0), crystal(1)]
    if not marked:
        for row in rows:
            del row.pbc  # as in OC20's LMDBs: the host repeats all directions
    batch = collate(rows)
    plain, noisy = step_on(trainer, batch)
    expected, vectors = edges_of_search(batch, plain, [BULK, BULK])
    found, found_vectors = edges_of_host(trainer, batch, noisy, noisy.pos)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found_vectors, vectors, rtol=0, atol=1e-5)
    without, _ = edges_of_host(trainer, batch, noisy, plain)
    assert len(without) < len(expected)  # the host alone would lose some


def test_atoms_are_put_back_along_the_directions_of_the_hosts_graph_alone(data, tmp_path):
    trainer = trainer_of(data, tmp_path, {"dens": NOISE})
    batch = collate([crystal(0, SLAB), crystal(1, SLAB)])
    plain, noisy = step_on(trainer, batch)
    assert torch.equal(edges_of_host(trainer, batch, noisy, noisy.pos)[0], edges_of_search(batch, plain, [SLAB] * 2)[0])
    moved = (noisy.pos - plain).abs() > 1
    assert moved[:, 0].any()
    assert not moved[:, 2].any()


def test_graphs_made_one_at_a_time_have_directions_of_their_own(data, tmp_path):
    kinds = [BULK, SLAB, MOLECULE]
    trainer = trainer_of(data, tmp_path, {"dens": NOISE}, use_pbc_single=True)
    batch = collate([crystal(number, pbc) for number, pbc in enumerate(kinds)])
    plain, noisy = step_on(trainer, batch)
    assert torch.equal(edges_of_host(trainer, batch, noisy, noisy.pos)[0], edges_of_search(batch, plain, kinds)[0])
    molecule = batch.batch == 2
    assert torch.equal(noisy.pos[molecule], plain[molecule])
    assert not torch.equal(noisy.pos, plain)


def test_molecules_are_never_put_back(data, tmp_path):
    """Neither where the data says that nothing repeats, nor where the model repeats nothing whatever the data says."""
    trainer = trainer_of(data, tmp_path, {"dens": NOISE})
    plain, noisy = step_on(trainer, collate([crystal(0, MOLECULE), crystal(1, MOLECULE)]))
    assert torch.equal(noisy.pos, plain)
    trainer._unwrapped_model.backbone.use_pbc = False
    plain, noisy = step_on(trainer, collate([crystal(0), crystal(1)]))
    assert torch.equal(noisy.pos, plain)


def test_the_clean_view_is_put_back_too(data, tmp_path):
    """Pre-training moves the atoms of the clean view a little, and atoms at a cell's face leave it."""
    trainer = make_trainer(pretraining(data, denoising={"scd": {"std": 0.4, "std_reg": 0.4}}), tmp_path)
    trainer.model.train()
    batch = collate([crystal(0), crystal(1)])
    clean = trainer._begin(batch).plan.passes[0]
    assert clean.embed
    found, _ = edges_of_host(trainer, batch, clean, clean.pos)
    assert torch.equal(found, edges_of_search(batch, clean.pos, [BULK, BULK])[0])
