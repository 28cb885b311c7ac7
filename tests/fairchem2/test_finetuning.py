"""Fine-tuning of a checkpoint of UMA's shape, by the host's own function, with denoising beside it."""

from __future__ import annotations

import pytest
import torch

from tests.fairchem2.support import (
    UMA,
    UNIT,
    differences,
    inner,
    model_config,
    run,
    run_config,
    sample_data,
    tasks_config,
)

# As the released model has them: experts with dropout, mixed by composition, charge, spin and data set.
EXPERTS = {"experts": 4, "moe_dropout": 0.05, "use_composition_embedding": True, "composition_dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sample_data(tmp_path_factory.mktemp("finetuning"))


@pytest.fixture(scope="module")
def released(folder):
    """The inference checkpoint of a plain run with direct forces."""
    finished = run(run_config(folder, model=model_config(**EXPERTS), steps=2, checkpoint_every=10), "released")
    return finished.checkpoint() / "inference_ckpt.pt"


def finetuned(folder, released, denoising, name):
    """A conservative fine-tuning run, as the host's template has it."""
    model = {
        "_target_": f"{UNIT}.initialize_finetuning_model",
        "checkpoint_location": str(released),
        "overrides": {
            "backbone": {
                "otf_graph": True,
                "direct_forces": False,
                "regress_forces": True,
                "regress_stress": True,
                "activation_checkpointing": True,
            },
            "pass_through_head_outputs": True,
            # The host builds the checkpoint's own heads first, and the old one for energies refuses such a backbone.
            "heads": {"energy": {"module": f"{UMA}.escn_md.MLP_EFS_Head"}},
        },
        "heads": {"efs": {"module": f"{UMA}.escn_md.MLP_EFS_Head"}},
    }
    return run(run_config(folder, model=model, tasks=tasks_config(stress=True), denoising=denoising, steps=3), name)


BLOCKS = [{"scd": {"prob": 0.7}}, {"dens": {"prob": 0.7}, "quiet_heads": True}]


@pytest.mark.parametrize("block", BLOCKS, ids=["scd", "dens"])
def test_a_checkpoint_of_umas_shape_is_fine_tuned_conservatively_with_denoising(folder, released, block):
    task = next(iter(block))
    tuned = finetuned(folder, released, block, task)
    start = torch.load(released, weights_only=False).model_state_dict
    first = tuned.state("step_0")["model"]
    backbone = [key for key in start if key.startswith("backbone.")]
    assert all(torch.equal(start[key], first[key]) for key in backbone)
    last = "output_heads.efs.energy_block.4.weight"
    assert not first[last].any(), "new heads start quietly"
    assert not tuned.state("step_0")["ema"][f"module.{last}"].any()
    assert not tuned.inference("step_0").model_state_dict[last].any()
    assert tuned.state("step_2")["model"][last].any()
    assert 0 < len(tuned.logged("train/denoising_pos_mae")) <= 3
    resumed = run(tuned.checkpoint("step_2") / "resume.yaml", f"{task}-resumed")
    ends = [inner(each.unit).state_dict() for each in (tuned, resumed)]
    assert differences(*map(dict, ends)) == []
    assert differences(tuned.state(), resumed.state()) == []
    config = tuned.inference().model_config
    assert list(config["heads"]) == ["efs"]
    assert config["backbone"]["direct_forces"] is False
    assert not any("denoising" in key for key in tuned.inference().model_state_dict)
