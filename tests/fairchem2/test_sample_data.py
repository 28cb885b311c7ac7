"""Sample data on fairchem 2.x: the host's own database, made on first use, with EMT's labels."""

from __future__ import annotations

import numpy as np
import pytest
from fairchem.core.common.registry import registry

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem2.sample_data import write_emt_slabs
from fairchem_scd.sample_data import emt_slabs

NAME = "fairchem_scd.fairchem2.sample_data.EmtSlabsDataset"
SETTINGS = {"num_structures": 6, "num_systems": 3, "seed": 2}


def opened(folder, **settings):
    transforms = {"common_transform": {"dataset_name": "emt"}}
    return registry.get_dataset_class(NAME)({"src": str(folder), "transforms": transforms, **SETTINGS, **settings})


def test_rows_are_the_sample_slabs_with_their_labels(tmp_path):
    dataset = opened(tmp_path / "slabs")
    assert len(dataset) == 6
    for row, (atoms, sid, fid) in zip(dataset, emt_slabs(**SETTINGS), strict=True):
        np.testing.assert_allclose(row.energy, [atoms.get_potential_energy()], rtol=1e-6)
        forces = atoms.get_forces(apply_constraint=False)
        np.testing.assert_allclose(row.forces, forces, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(row.fixed, [i in atoms.constraints[0].index for i in range(len(atoms))])
        np.testing.assert_array_equal(row.tags, atoms.get_tags())
        assert row.sid == [f"{sid}-frame-{fid}"]
        assert dataset.get_metadata("natoms", fid) == len(atoms)


def test_it_is_written_once(tmp_path):
    opened(tmp_path / "slabs")
    written = (tmp_path / "slabs" / "data.aselmdb").stat()
    opened(tmp_path / "slabs")
    assert (tmp_path / "slabs" / "data.aselmdb").stat().st_mtime_ns == written.st_mtime_ns
    assert sorted(path.name for path in tmp_path.iterdir()) == [".slabs.lock", "slabs"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "was written with seed 2 instead of 1"),
        ({"num_structures": 0}, r"num_structures: expected a whole number of at least 1 \(got 0\)"),
        ({"src": ["a", "b"]}, "needs src, one folder for its data"),
    ],
)
def test_what_it_cannot_be_is_an_error(settings, message, tmp_path):
    opened(tmp_path / "slabs")
    with pytest.raises(ConfigError, match=message):
        opened(**{"folder": tmp_path / "slabs", **settings})


def test_data_of_the_other_fairchem_in_the_folder_is_an_error(tmp_path):
    folder = tmp_path / "slabs"
    folder.mkdir()
    (folder / "settings.json").write_text('{"num_structures": 6, "num_systems": 3, "seed": 2}')
    with pytest.raises(ConfigError, match="format None instead of aselmdb"):
        write_emt_slabs(folder, **SETTINGS)
