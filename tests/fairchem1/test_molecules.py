"""Molecules: graphs without periodic boundaries, with and without torch_cluster."""

from __future__ import annotations

from importlib import util
from unittest import mock

import pytest
import torch
from ase.build import molecule
from fairchem.core.preprocessing import AtomsToGraphs

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import base
from fairchem_scd.testing import collate, plan_of, run, stirred
from tests.support.claims import PAINN, PaiNN

CUTOFF = PAINN["cutoff"]
SCD = {"scd": {}}
NAMES = ("CH3CH2OH", "C6H6")


def row(name, **cell):
    """A molecule as ASE databases give it: with `pbc`, in a cell of its own or none."""
    atoms = molecule(name, **cell)
    out = AtomsToGraphs(r_edges=False, r_pbc=True).convert(atoms)
    out.sid, out.fid, out.natoms = 0, 0, len(atoms)
    return out


def periodic(name, size):
    """A molecule as LMDBs have it: periodic, in a large cell."""
    atoms = molecule(name)
    converter = AtomsToGraphs(r_edges=False, r_pbc=False, molecule_cell_size=size)
    out = converter.convert(atoms)
    out.sid, out.fid, out.natoms = 0, 0, len(atoms)
    return out


@pytest.fixture
def model():
    return stirred(PaiNN().ours(SCD)).eval()


def test_a_graph_has_the_pairs_within_the_cutoff_and_no_images(model):
    for rows in ([row(name) for name in NAMES], [periodic(name, CUTOFF) for name in NAMES]):
        batch = collate(rows)
        edges = {tuple(pair) for pair in model.backbone.generate_graph(batch).edge_index.T.tolist()}
        near = torch.cdist(batch.pos, batch.pos) < CUTOFF
        near &= (batch.batch[:, None] == batch.batch) & ~torch.eye(len(batch.pos), dtype=torch.bool)
        assert edges == {tuple(pair) for pair in near.nonzero().tolist()}


def test_a_molecule_is_denoised_alike_in_any_large_cell(model):
    batches = [collate([row(name) for name in NAMES])]
    batches += [collate([periodic(name, size) for name in NAMES]) for size in (8, 12)]
    with torch.no_grad():
        first, *others = (run(model, batch, plan_of(batch, SCD)[0]) for batch in batches)
    for other in others:
        for key, value in first.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


@pytest.mark.skipif(util.find_spec("torch_cluster") is None, reason="torch_cluster is not installed")
def test_torch_cluster_makes_the_same_graph(model):
    batch = collate([row(name) for name in NAMES])
    expected = model.backbone.generate_graph(batch).edge_index
    model.backbone.use_pbc = False
    found = model.backbone.generate_graph(batch).edge_index
    assert set(map(tuple, found.T.tolist())) == set(map(tuple, expected.T.tolist()))


def test_without_torch_cluster_a_run_that_needs_it_is_refused():
    class Open(PaiNN):
        backbone = {**PAINN, "use_pbc": False}

    with mock.patch.object(base, "find_spec", return_value=None):
        with pytest.raises(ConfigError, match=r"use_pbc.*torch_cluster.*large cell"):
            Open().ours(SCD)
    with mock.patch.object(base, "find_spec", return_value=object()):
        assert Open().ours(SCD)
