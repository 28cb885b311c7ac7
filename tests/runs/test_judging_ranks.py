"""What SCD's condition is worth is the same number on one rank, on two and on four, though the data divide unevenly."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fairchem_scd.testing import make_trainer, on_ranks, stirred
from tests.support.configs import pretraining, tiny_config
from tests.support.models import edge_frames_without_chance

STRUCTURES = 6  # on four ranks two of them come twice
KINDS = {"pre-training": (pretraining, {}), "beside labels": (tiny_config, {"judge_condition": True})}


def validated(data: Path, folder: Path, batch_size: int) -> dict[str, dict[str, float]]:
    """The metrics of a validation of each kind."""
    found = {}
    for kind, (config_of, settings) in KINDS.items():
        config = config_of(data, denoising={"scd": settings}, optim={"eval_batch_size": batch_size, "ema_decay": None})
        config["dataset"]["val"]["num_structures"] = STRUCTURES
        config["dataset"]["val"]["src"] = str(data / "judged")
        with edge_frames_without_chance():
            trainer = make_trainer(config, folder / kind.replace(" ", "_"))
            stirred(trainer._unwrapped_model)
            metrics = trainer.validate(disable_tqdm=True)
        found[kind] = {name: value["metric"] for name, value in metrics.items() if name != "loss"}
    return found


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    return validated(data, tmp_path_factory.mktemp("alone"), 4)


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 1), (4, 1), (2, 3)])
def test_ranks_find_what_one_does(ranks, batch_size, alone, data, tmp_path):
    logging.disable(logging.WARNING)
    try:
        results = on_ranks(ranks, tmp_path / "run", lambda rank: validated(data, tmp_path / "run", batch_size))
    finally:
        logging.disable(logging.NOTSET)
    for kind, expected in alone.items():
        names = [name for name in expected if "pos_mae" in name or "condition" in name]
        assert len(names) == 10
        assert expected["denoising_pos_mae_other"] != expected["denoising_pos_mae"]
        for name in names:
            assert all(result[kind][name] == results[0][kind][name] for result in results), name
            assert results[0][kind][name] == pytest.approx(expected[name], rel=1e-4), (kind, name)
