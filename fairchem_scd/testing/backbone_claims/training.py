"""Claims about training: it runs, exports are the host's plain models, and two ranks compute what one does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.models.base import HydraModel

from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.testing.backbone_claims.models import BackboneModels
from fairchem_scd.testing.support import (
    SCD,
    collate,
    make_trainer,
    on_ranks,
    run,
    self_supervised,
    slabs,
    stirred,
    training_config,
)


class TrainingClaims(BackboneModels):
    @pytest.fixture(scope="session")
    def sample(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Folder in which sample data is kept."""
        return tmp_path_factory.mktemp("claims")

    def config(self, folder: Path, block: Mapping[str, Any]) -> dict[str, Any]:
        """A training config, with sample data in a folder."""
        return training_config(folder, self.arguments(), block)

    def test_it_trains_and_its_export_is_plain_fairchem(self, sample: Path, tmp_path: Path) -> None:
        trainer = make_trainer(self.config(sample, SCD), tmp_path)
        before = copy.deepcopy(trainer._unwrapped_model.state_dict())
        trainer.train(disable_eval_tqdm=True)
        model = trainer._unwrapped_model.eval()
        moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved >= {"backbone", "denoising"}
        assert torch.isfinite(torch.stack([p.abs().max() for p in model.parameters()])).all()
        stored = checkpoint.read(Path(trainer.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt")
        exported = checkpoint.export(stored, weights="raw")
        config = exported["config"]["model"]
        assert config.pop("name") == "hydra"
        plain = HydraModel(**config).eval()
        plain.load_state_dict({key.removeprefix("module."): value for key, value in exported["state_dict"].items()})
        batch = self.batch(2)
        out = run(model, batch)
        for key, value in run(plain, batch).items():
            assert torch.equal(out[key], value), key

    @pytest.mark.parametrize("supervised", [True, False])
    def test_two_ranks_do_as_one(self, supervised: bool, sample: Path, tmp_path: Path) -> None:
        """Loss, gradients, noise and running scale of a step, on ranks with different numbers of atoms."""
        rows = slabs(4, seed=2)
        block = {"scd": {"noise_scale": "running"}} if supervised or not self.conditions_on_forces() else {}
        block = block or {"scd": {"noise_scale": "running", "condition": ["self", "forces"]}}
        config = self.config(sample, block)
        config = config if supervised else self_supervised(config)
        config["trainer"] = "fairchem_scd.DenoisingTrainer"
        config["optim"].update(scheduler="Null", scheduler_params={})

        def step(chosen: list[int], identifier: str) -> dict[str, Any]:
            trainer = make_trainer(config, tmp_path / identifier, identifier=identifier)
            stirred(trainer._unwrapped_model, 0.3)
            trainer.model.train()
            trainer.step = 3
            batch = collate([rows[i] for i in chosen])
            loss = trainer._compute_loss(trainer._forward(batch), batch)
            loss.backward()
            found = {n: p.grad for n, p in trainer._unwrapped_model.named_parameters() if p.requires_grad}
            return {"loss": loss.detach(), "gradients": found, "scale": float(trainer._step.objective.scale)}

        alone = step([0, 1, 2, 3], "alone")
        split = [[0, 2, 3], [1]]
        results = on_ranks(2, tmp_path / "ranks", lambda rank: step(split[rank], f"rank{rank}"))
        assert results[0]["scale"] == results[1]["scale"]
        assert abs(results[0]["scale"] / alone["scale"] - 1) < 1e-6
        # A rank's loss is its share of the whole loss, times the number of ranks, because DDP averages.
        both = (results[0]["loss"] + results[1]["loss"]) / 2
        torch.testing.assert_close(both, alone["loss"], rtol=1e-5, atol=1e-5)
        for key, gradient in alone["gradients"].items():
            scale = max(float(gradient.abs().max()), 1e-3)
            for result in results:
                error = float((result["gradients"][key] - gradient).abs().max()) / scale
                assert error < 1e-3, (key, error)
