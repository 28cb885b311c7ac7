"""Makes the checkpoints of this folder, and what came of them, with the code of commit a946897.

    git worktree add ../a946897 a946897
    PYTHONPATH=../a946897 NUMBA_DISABLE_JIT=1 OMP_NUM_THREADS=1 python tests/data/a946897/make.py

It is not run again: the tests compare later code with these files, and never with themselves.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.common.utils import setup_imports
from fairchem_scd.data.emt_slabs import emt_slabs
from fairchem_scd.embeddings import embed

from fairchem_scd.testing import make_trainer, self_supervised, slabs, training_config

HERE = Path(__file__).parent
SEED = 7
"""With it each half of a run has steps of every kind."""

STOPPED, LAST = 4, 8
"""Steps: of the checkpoint, and of the run."""

BACKBONE = {
    "model": "equiformer_v2_backbone",
    "use_pbc": True,
    "otf_graph": True,
    "max_neighbors": 300,
    "max_radius": 4.5,
    "max_num_elements": 80,
    "num_layers": 1,
    "sphere_channels": 4,
    "attn_hidden_channels": 4,
    "num_heads": 1,
    "attn_alpha_channels": 4,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 4,
    "norm_type": "layer_norm_sh",
    "lmax_list": [1],
    "mmax_list": [1],
    "edge_channels": 4,
    "num_distance_basis": 16,
    "attn_activation": "silu",
    "ffn_activation": "silu",
    "use_grid_mlp": True,
    "alpha_drop": 0.1,
    "drop_path_rate": 0.1,
    "weight_init": "uniform",
}
MODEL = {
    "backbone": BACKBONE,
    "heads": {"energy": {"module": "equiformerV2_scalar_head"}, "forces": {"module": "equiformerV2_vector_head"}},
    "pass_through_head_outputs": True,
}
RUNS = {
    "dens_and_scd": {"dens": {"prob": 0.4}, "scd": {"prob": 0.4}},
    "mask_token": {"scd": {"prob": 0.6, "null_condition": "mask_token"}},
    "pretraining": {"scd": {}},
}


def config_of(name: str) -> dict:
    config = training_config(Path("data"), MODEL, RUNS[name])
    config["optim"].update(max_epochs=2, batch_size=2, eval_batch_size=2)
    return self_supervised(config) if name == "pretraining" else config


def trained(config: dict, folder: str, start: Path | None = None) -> tuple[Path, object]:
    """The run from its beginning, or from a checkpoint, to its end; and its checkpoint after step `STOPPED`."""
    trainer = make_trainer(config, Path(folder), timestamp_id="a946897", seed=SEED)
    trainer.config["cmd"]["commit"] = "core:NA,experimental:NA"  # else of whatever repository lies around the host
    kept = Path(folder, "kept.pt")
    if start is not None:
        trainer.load_checkpoint(str(start))
    save = trainer.save

    def save_and_keep(*args, **kwargs):
        path = save(*args, **kwargs)
        if trainer.step == STOPPED and Path(path).name == "checkpoint.pt":
            shutil.copy(path, kept)
        return path

    trainer.save = save_and_keep
    steps = [getattr(trainer.draw_task(step), "name", "ordinary") for step in range(LAST)]
    for half in (steps[:STOPPED], steps[STOPPED:]) if config["outputs"] else ():
        assert set(half) == {"ordinary", *RUNS[Path(folder).parts[0]]}, steps
    torch.manual_seed(5)
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == LAST
    return kept, trainer


def state_after(trainer: object) -> dict[str, np.ndarray]:
    """All numbers of the weights and of their moving average, one after the other, in the order of the checkpoint."""
    weights = [value for value in trainer._unwrapped_model.state_dict().values() if value.is_floating_point()]
    found = {"weights": weights, "average": trainer.ema.shadow_params}
    return {key: torch.cat([value.flatten() for value in values]).numpy() for key, values in found.items()}


def structures() -> list[Atoms]:
    return [atoms for atoms, _, _ in emt_slabs(2, seed=3, num_systems=6)]


def predictions(path: Path) -> dict[str, np.ndarray]:
    """Energy (eV) and forces (eV/Å) of the raw weights, as the host's calculator has them."""
    found = {}
    for i, atoms in enumerate(structures()):
        calculator = OCPCalculator(checkpoint_path=str(path), cpu=True)
        torch.manual_seed(3)
        calculator.calculate(atoms, ["energy", "forces"], [])
        found[f"energy/{i}"] = np.array(calculator.results["energy"])
        found[f"forces/{i}"] = np.array(calculator.results["forces"])
    return found


def main() -> None:
    torch.set_num_threads(1)
    setup_imports()
    atoms = {}
    for i, one in enumerate(structures()):
        atoms |= {f"numbers/{i}": one.numbers, f"positions/{i}": one.positions, f"cell/{i}": one.cell.array}
    np.savez_compressed(HERE / "structures.npz", **atoms)
    os.chdir(tempfile.mkdtemp())  # the configs name relative paths, and so do the checkpoints
    for name in RUNS:
        config = config_of(name)
        path, uninterrupted = trained(config, f"{name}/whole")
        _, resumed = trained(config, f"{name}/resumed", path)
        expected = state_after(resumed)
        for key, value in state_after(uninterrupted).items():
            assert np.array_equal(value, expected[key]), key
        for weights in ("raw", "ema"):
            embedded = embed(str(path), slabs(2, seed=3), weights=weights)
            expected[f"features/{weights}"] = embedded.features
            expected[f"condition/{weights}"] = embedded.condition
        if name != "pretraining":
            expected |= predictions(path)
        (HERE / f"{name}.pt.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        np.savez_compressed(HERE / f"{name}.npz", **expected)
        (HERE / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
