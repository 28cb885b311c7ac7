"""Two gloo ranks do what one process does on the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.escn.escn import eSCN

from fairchem_scd.testing import collate, make_trainer, on_ranks, slabs
from tests.support.configs import tiny_config
from tests.support.models import fixed_edge_frames

# One of molecular dynamics is never corrupted; its adsorbate, and the last's, is one atom: no part to denoise.
MD = [0, 1, 0, 0]
SPLITS = {"even": [[0, 1], [2, 3]], "uneven": [[0, 2, 3], [1]]}
TAGS = {"embed_tags": [0, 1], "denoise_tags": [2]}
CASES = {
    "dens": ("equiformer_v2", {"dens": {"prob": 1.0}}),
    "dens escn": ("escn", {"dens": {"prob": 1.0, "all_atoms": True}}),
    "noisy nodes": ("equiformer_v2", {"noisy_nodes": {"prob": 1.0, "coefficient": 5}}),
    "ordinary": ("equiformer_v2", {"dens": {"prob": 0.0}}),
    "scd": ("equiformer_v2", {"scd": {"condition": ["self", "forces"]}}),
    "scd adsorbates": ("equiformer_v2", {"scd": TAGS}),
    "pre-training": ("equiformer_v2", {"scd": {"noise_scale": "running"}}),
    "pre-training escn": ("escn", {"scd": {"stop_gradient_condition": True}}),
}


def one_step(folder: Path, name: str, block: dict[str, Any], chosen: list[int], identifier: str) -> dict[str, Any]:
    """Loss and gradients of one step on some of the four structures, and the corruption drawn."""
    torch.set_num_threads(1)
    EquiformerV2Backbone._init_edge_rot_mat = fixed_edge_frames
    eSCN._init_edge_rot_mat = fixed_edge_frames
    config = tiny_config(folder, name, block)
    if "pre-training" in identifier:
        config.update(outputs={}, loss_functions=[], evaluation_metrics={})
        config["model"].pop("heads")
    trainer = make_trainer(config, folder / identifier, identifier=identifier)
    stir(trainer._unwrapped_model)
    rows = slabs(4, seed=2)
    for row, md in zip(rows, MD, strict=True):
        row.md = torch.tensor([md])
    batch = collate([rows[i] for i in chosen])
    trainer.model.train()
    trainer.step = 3
    out = trainer._forward(batch)
    loss = trainer._compute_loss(out, batch)
    trainer._compute_metrics(out, batch, trainer.evaluator, {})
    loss.backward()
    step = trainer._step
    return {
        "loss": loss.detach(),
        "gradients": {n: p.grad for n, p in trainer._unwrapped_model.named_parameters() if p.grad is not None},
        "noise": dict(zip(chosen, step.corruption.noise.split(batch.natoms.tolist()), strict=True)) if step else {},
        "scale": float(step.objective.scale) if step else None,
        "frozen": [n for n, p in trainer._unwrapped_model.named_parameters() if not p.requires_grad],
    }


def stir(model: Any) -> None:
    """Move what a condition goes through away from its start, where it does nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modulation" in name:
                p += 0.3 * torch.randn(p.shape, generator=generator)


def steps(rank: int, folder: Path) -> dict[Any, Any]:
    """What a rank gets, by case and split."""
    return {
        (case, split): one_step(folder, *CASES[case], chosen[rank], f"{case}-{split}-rank{rank}")
        for case in CASES
        for split, chosen in SPLITS.items()
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, folder, lambda rank: steps(rank, folder))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_as_one(case, split, ranks, tmp_path, monkeypatch):
    """Also where one rank holds more atoms, and where nothing is corrupted on one of them."""
    monkeypatch.setattr(EquiformerV2Backbone, "_init_edge_rot_mat", fixed_edge_frames)
    monkeypatch.setattr(eSCN, "_init_edge_rot_mat", fixed_edge_frames)
    alone = one_step(tmp_path, *CASES[case], [0, 1, 2, 3], f"{case}-alone")
    results = [rank[case, split] for rank in ranks]
    assert case == "ordinary" or any(noise.any() for noise in alone["noise"].values())
    for result in results:
        for structure, noise in result["noise"].items():
            assert torch.equal(noise, alone["noise"][structure])
        # The running scale too, to the last bit on all ranks.
        assert result["scale"] == results[0]["scale"]
        assert result["scale"] == alone["scale"] or abs(result["scale"] / alone["scale"] - 1) < 1e-6
        assert result["frozen"] == alone["frozen"]
    # Each rank's loss is its own share times the number of ranks; DDP averages.
    torch.testing.assert_close((results[0]["loss"] + results[1]["loss"]) / 2, alone["loss"], rtol=1e-5, atol=1e-5)
    for key, gradient in alone["gradients"].items():
        scale = max(float(gradient.abs().max()), 1e-3)
        for result in results:
            assert float((result["gradients"][key] - gradient).abs().max()) < 1e-4 * scale, key
