"""What tells structures apart: names, numbers of rows, and within a batch a count."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fairchem_scd.denoising.structures import identities, names, structures_of
from tests.denoising.support import clusters


def test_a_row_number_and_what_a_row_stands_in_for_join_its_name():
    batch = SimpleNamespace(sid=["a", "a", "b"], fid=torch.tensor([0, 0, 1]))
    assert names(batch) == identities(batch) == ["a/0", "a/0", "b/1"]
    batch.row_number, batch.stands_in_for = torch.tensor([3, 8, 9]), ["", "", "row 10"]
    assert names(batch) == ["a/0", "a/0", "b/1"]
    assert identities(batch) == ["a/0/3", "a/0/8", "b/1/9 for row 10"]


def test_one_row_has_the_identity_that_it_has_in_a_batch():
    row = SimpleNamespace(sid="a", fid=torch.tensor([0]), row_number=3, stands_in_for="row 2")
    batch = SimpleNamespace(sid=["a"], fid=torch.tensor([0]), row_number=torch.tensor([3]), stands_in_for=["row 2"])
    assert identities(row) == identities(batch) == ["a/0/3 for row 2"]


def test_structures_that_share_an_identity_within_a_batch_are_told_apart_in_any_order():
    numbers = (2, 0, 1, 3)
    of_cluster = []
    for order in (numbers, tuple(reversed(numbers))):
        batch = joined([clusters((5,), first=number) for number in order])
        batch.sid = ["same" if number < 3 else "other" for number in order]
        ids = structures_of(batch).ids
        assert len(set(ids)) == 4
        assert sorted(ids) == ["other/0", "same/0", "same/0 (2)", "same/0 (3)"]
        of_cluster.append(dict(zip(order, ids, strict=True)))
    assert of_cluster[0] == of_cluster[1]


def test_the_same_structure_twice_in_a_batch_gets_two_identities():
    assert structures_of(joined([clusters((5,)), clusters((5,))])).ids == ["0/0", "0/0 (2)"]


def joined(batches):
    """Batches of one structure each, as one."""
    return SimpleNamespace(
        pos=torch.cat([batch.pos for batch in batches]),
        fixed=torch.cat([batch.fixed for batch in batches]),
        natoms=torch.cat([batch.natoms for batch in batches]),
        sid=[name for batch in batches for name in batch.sid],
        fid=[name for batch in batches for name in batch.fid],
    )
