"""Two gloo ranks do what one process does on the same global batch: every task, and what its settings change.

That they do on every backbone, with the default settings of SCD, is one of its claims (`BackboneClaims`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fairchem_scd.fairchem1.trainer.step_state import DenoisingStep
from fairchem_scd.testing import collate, make_trainer, on_ranks, slabs, stirred
from tests.support.configs import pretraining, tiny_config
from tests.support.models import edge_frames_without_chance

# One of molecular dynamics is never corrupted; its adsorbate, and the last's, is one atom: no part to denoise. It is
# all that the second rank has.
MD = [0, 1, 0, 0]
SPLIT = [[0, 2, 3], [1]]
TAGS = {"embed_tags": [0, 1], "denoise_tags": [2]}
CASES = {
    "dens": ("equiformer_v2", {"dens": {"prob": 1.0}}),
    "dens escn": ("escn", {"dens": {"prob": 1.0, "all_atoms": True}}),
    "noisy nodes": ("equiformer_v2", {"noisy_nodes": {"prob": 1.0, "coefficient": 5}}),
    "ordinary": ("equiformer_v2", {"dens": {"prob": 0.0}}),
    "scd": ("equiformer_v2", {"scd": {"condition": ["self", "forces"]}}),
    "scd adsorbates": ("equiformer_v2", {"scd": TAGS}),
    "scd with the clean pass recomputed": ("equiformer_v2", {"scd": {"recompute_clean_pass": True}}),
    "pre-training escn": ("escn", {"scd": {"stop_gradient_condition": True}}),
}


def one_step(folder: Path, name: str, block: dict[str, Any], chosen: list[int], identifier: str) -> dict[str, Any]:
    """Loss and gradients of one step on some of the four structures, and the corruption drawn."""
    config = (pretraining if "pre-training" in identifier else tiny_config)(folder, name, block)
    trainer = make_trainer(config, folder / identifier, identifier=identifier)
    stirred(trainer._unwrapped_model, 0.3)
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
    step = trainer._step if isinstance(trainer._step, DenoisingStep) else None
    return {
        "loss": loss.detach(),
        "gradients": {n: p.grad for n, p in trainer._unwrapped_model.named_parameters() if p.grad is not None},
        "noise": dict(zip(chosen, step.corruption.noise.split(batch.natoms.tolist()), strict=True)) if step else {},
        "scale": float(step.objective.scale) if step else None,
        "frozen": [n for n, p in trainer._unwrapped_model.named_parameters() if not p.requires_grad],
    }


def steps(rank: int, folder: Path) -> dict[Any, Any]:
    """What a rank gets, by case."""
    return {case: one_step(folder, *CASES[case], SPLIT[rank], f"{case}-rank{rank}") for case in CASES}


@pytest.fixture(autouse=True, scope="module")
def _edge_frames_without_chance() -> Iterator[None]:
    with edge_frames_without_chance():
        yield


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, folder, lambda rank: steps(rank, folder))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_as_one(case, ranks, tmp_path):
    """One rank holds more atoms than the other, on which in some cases nothing is corrupted."""
    alone = one_step(tmp_path, *CASES[case], [0, 1, 2, 3], f"{case}-alone")
    results = [rank[case] for rank in ranks]
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
