"""Fingerprints of training: a hash of all weights after some steps of each kind of run, on every backbone.

Two versions of the package train alike, bit for bit, where their files of fingerprints are equal:

    python -m benchmarks.fingerprint now.json                                  # in this clone
    PYTHONPATH=OTHER_CLONE python benchmarks/fingerprint.py before.json        # the same script over other code
    python -m benchmarks.fingerprint now.json --against before.json            # goes on where it stopped, and compares

It uses only names that `fairchem_scd.testing` and `benchmarks.common` had before the package was laid out anew. The
same machine, versions and one thread are needed on both sides: sums in another order differ in the last bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common.utils import setup_imports

import fairchem_scd
from benchmarks.common import BACKBONES, SCALAR_BACKBONES, hydra
from fairchem_scd.testing import make_trainer, self_supervised, training_config

STEPS = 20
_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dens": {"dens": {"prob": 0.7}},
    "dens, schedule of noise": {
        "dens": {"prob": 1.0, "num_steps": 4, "std_low": 0.02, "std_high": 0.2, "sigma_encoding": True}
    },
    "scd": {"scd": {"prob": 0.8}},
    "scd, schedule of noise": {"scd": {"num_steps": 4, "std_low": 0.02, "std_high": 0.2}},
    "scd, mask token": {"scd": {"null_condition": "mask_token"}},
    "scd, adsorbate under its slab": {"scd": {"embed_tags": [0, 1], "denoise_tags": [2, 1]}},
    "scd told forces": {"scd": {"condition": ["self", "forces"]}},
    "all in turns": {"dens": {"prob": 0.3}, "scd": {"prob": 0.4}, "noisy_nodes": {"prob": 0.2}},
    "scd and noisy nodes": {"scd": {"prob": 0.5}, "noisy_nodes": {"prob": 0.5}},
    "pre-training": {"scd": {}},
    "pre-training, cells repeated": {"scd": {"condition": []}, "repeat_cells": {"max_atoms": 40}},
}
_NEEDS_VECTORS = {"dens", "dens, schedule of noise", "scd told forces", "all in turns"}


def runs() -> Iterator[tuple[str, str]]:
    """Pairs of a backbone and a kind of run that it can do."""
    for backbone in (*BACKBONES, "equiformer_v2, recomputed"):
        for kind in _KINDS:
            gradient = backbone.endswith("conservative") or backbone == "dimenetplusplus"
            if backbone in SCALAR_BACKBONES and kind in _NEEDS_VECTORS:
                continue
            if gradient and kind == "scd, mask token":
                continue
            yield backbone, kind


def fingerprint(backbone: str, kind: str, folder: Path) -> dict[str, Any]:
    """Train, and hash what came out.

    Args:
        backbone: of `BACKBONES`; "…, recomputed" has activation checkpointing.
        kind: a key of `_KINDS`.
        folder: where sample data is kept, and the run's own files.

    Returns:
        Hashes of the weights by the host's names, of what the package adds, and of the moving average.
    """
    name, _, recomputed = backbone.partition(", ")
    model = hydra(name, layers=2, channels=24 if name in SCALAR_BACKBONES else 16, lmax=2, radius=4.5, neighbors=40)
    if recomputed:
        model["backbone"]["activation_checkpoint"] = True
    config = training_config(folder / "data", model, _KINDS[kind])
    config["trainer"] = "fairchem_scd.EquiformerV2DenoisingTrainer"
    config["optim"].update(max_epochs=STEPS // 2, eval_every=STEPS, checkpoint_every=-1)
    if kind.startswith("pre-training"):
        config = self_supervised(config)
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        trainer = make_trainer(config, Path(run_dir), identifier="fingerprint")
        trainer.train(disable_eval_tqdm=True)
    if trainer.step != STEPS:
        raise RuntimeError(f"{backbone}, {kind}: {trainer.step} steps instead of {STEPS}")
    state = trainer._unwrapped_model.state_dict()
    return {
        "host weights": _hash({k: v for k, v in state.items() if not k.startswith("denoising.")}),
        "added weights": _hash({k: v for k, v in state.items() if k.startswith("denoising.")}),
        "average": _hash(dict(enumerate(trainer.ema.shadow_params))),
    }


def _hash(tensors: dict[Any, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors, key=str):
        value = tensors[key].detach().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file of the fingerprints; what it holds already is kept")
    parser.add_argument("--against", type=Path, help="another such file, to compare with at the end")
    parser.add_argument("--backbones", nargs="+", help="these alone")
    parser.add_argument("--kinds", nargs="+", help="these alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    setup_imports()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    print(f"code: {Path(fairchem_scd.__file__).parent}")
    with tempfile.TemporaryDirectory() as folder:
        for backbone, kind in runs():
            key = f"{backbone}: {kind}"
            skipped = (arguments.backbones and backbone not in arguments.backbones) or (
                arguments.kinds and kind not in arguments.kinds
            )
            if key in found or skipped:
                continue
            try:
                found[key] = fingerprint(backbone, kind, Path(folder))
            except Exception as error:  # a combination that is refused is a result too
                found[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            print(key, found[key], flush=True)
            arguments.out.write_text(json.dumps(found, indent=1))
    if arguments.against:
        others = json.loads(arguments.against.read_text())
        different = [key for key in found if key in others and found[key] != others[key]]
        print(f"{len(found)} runs here, {len(others)} there, {len(different)} different")
        print("\n".join(f"  {key}: {others[key]} there, {found[key]} here" for key in different))


if __name__ == "__main__":
    main()
