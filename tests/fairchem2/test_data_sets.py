"""Several data sets, each with names of its own for its labels, from their databases to what a run logs."""

from __future__ import annotations

import pytest
import yaml

from tests.fairchem2.command_line import fairchem_scd
from tests.fairchem2.support import crystals, mixture, of_several_data_sets, run, run_config, write

DATASETS = ("oc20", "omol")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A conservative model over two data sets, with steps of every kind."""
    folder = tmp_path_factory.mktemp("several")
    for i, name in enumerate(DATASETS):
        write(folder / name, "train", crystals(6, 1000 * i))
        write(folder / name, "val", crystals(3, 1000 * i + 50))
    model, tasks = mixture(DATASETS, direct=False)
    block = {"dens": {"prob": 0.4}, "scd": {"prob": 0.4, "condition": ["self", "forces"]}}
    made = run_config(folder, model=model, tasks=tasks, denoising=block, evaluate_every=3, checkpoint_every=4)
    closing = {"_target_": "fairchem_scd.fairchem2.closing.ClosingReport"}
    made["runner"]["callbacks"].append(closing)
    return of_several_data_sets(made, folder, DATASETS)


def test_check_reports_each_data_sets_labels(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    output = fairchem_scd("check", path, "--repeats", "1").output
    assert "data sets: oc20.train, omol.train" in output
    for name in DATASETS:
        assert f"{name}_forces (|F| up to " in output
    assert "(absent)" not in output
    assert "No problems found." in output


def test_a_run_trains_and_validates_all_of_them(config):
    finished = run(config, "several")
    logged = {name for line in finished.lines if isinstance(line, dict) for name in line}
    for name in DATASETS:
        assert {f"train/{name}_energy_loss", f"train/denoising_{name}_force_mae"} <= logged
        assert any(f"val/{name}.val,{name}_forces,mae: " in str(line) for line in finished.lines)
    (closing,) = (str(line) for line in finished.lines if str(line).startswith("Training is done."))
    assert "task_name='oc20') (or 'omol')" in closing
