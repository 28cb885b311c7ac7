"""The files in configs/fairchem2: what is in them, that the host reads them, and a short run of each sample config."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from fairchem_scd.commands.add.added import differences
from fairchem_scd.commands.fairchem2.config_file import plain, read_config
from fairchem_scd.denoising.tasks import build_tasks
from tests.fairchem2.command_line import fairchem

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "fairchem2"
FILES = sorted(path.name for path in CONFIGS.glob("*.y*ml"))
PUBLISHED = "scd_escn_md_omat.yaml"
FILLED_IN = ("train_folders=[train]", "val_folders=[val]", f"elem_refs=[{','.join(['0.0'] * 100)}]")
SHORT = (
    "epochs=1",
    "train_data.splits.train.num_structures=8",
    "train_data.splits.train.src=data/train",
    "val_data.splits.val.num_structures=4",
    "val_data.splits.val.src=data/val",
    "train_dataloader.batch_sampler_fn.max_atoms=28",
    "runner.train_eval_unit.print_every=1",
)


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch, tmp_path):
    """Every command of the docs is run in the clone."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)


def read(name: str) -> dict:
    return plain(read_config(Path("configs/fairchem2") / name, FILLED_IN if name == PUBLISHED else ()))


def unit(name: str) -> dict:
    return read(name)["runner"]["train_eval_unit"]


@pytest.mark.parametrize("name", FILES)
def test_the_host_reads_it_and_its_tasks_are_known(name):
    made = unit(name)
    if name == "plain_sample.yaml":
        assert made["_target_"].startswith("fairchem.core.")
        return
    assert made["_target_"] == "fairchem_scd.DenoisingTrainEvalUnit"
    tasks, settings = build_tasks(made["denoising"], supervised=bool(made["tasks"]))
    assert tasks or settings.quiet_heads


def test_the_page_has_a_table_of_all():
    text = (ROOT / "docs" / "fairchem2.md").read_text()
    assert set(FILES) == set(re.findall(r"\]\(\.\./configs/fairchem2/(\w+\.ya?ml)\)", text))


@pytest.mark.parametrize("name", ["quickstart.yml", "add_scd.yaml", "add_dens.yaml"])
def test_it_differs_from_the_plain_config_by_one_target_and_one_block(name):
    changed = set(differences(read("plain_sample.yaml"), read(name)))
    assert changed == {"runner.train_eval_unit._target_", "runner.train_eval_unit.denoising"}


def test_fine_tuning_has_the_outputs_of_the_quick_start_and_no_backbone():
    start, tuned = unit("quickstart.yml"), unit("quickstart_finetune.yaml")
    assert tuned["tasks"] == start["tasks"]
    assert tuned["model"]["heads"] == start["model"]["heads"]
    assert "backbone" not in tuned["model"]


def test_the_published_size_is_what_of_uma_s_is_active():
    model = hydra.utils.instantiate(OmegaConf.create(unit(PUBLISHED)["model"]))
    parameters = sum(p.numel() for p in model.parameters())
    # UMA's paper (arXiv 2506.23971) gives 6 million active parameters for UMA-S.
    assert round(parameters / 1e6) == 6


def test_a_run_of_each_sample_config_ends_with_what_it_left_and_what_to_do_next():
    for name in ("quickstart.yml", "quickstart_pretrain.yaml", "quickstart_finetune.yaml"):
        stem = name.partition(".")[0].removeprefix("quickstart_")
        output = fairchem("-c", f"configs/fairchem2/{name}", f"+job.timestamp_id={stem}", *SHORT)
        final = Path("runs").resolve() / stem / "checkpoints" / "final"
        assert (final / "inference_ckpt.pt").is_file()
        *_, closing = output.partition("Training is done.")
        for path in re.findall(r"(/\S+?)'?,?(?= |$|\n)", closing):
            if path.startswith(str(final)):
                assert Path(path.rstrip("',")).exists(), path
        assert f"fairchem-scd embed {final} CONFIG" in closing
        assert ("task_name='emt')" in closing) == (stem != "pretrain")
        assert ("'train/denoising_pos_mae'" in output) == (stem != "finetune")  # which has no task
