"""Every command and every piece of Python in the pages about fairchem 2.x runs, in order, on sample data."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from ase.io import write as write_structures
from fairchem.core.calculate import pretrained_mlip
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from benchmarks.fairchem2 import step_cost
from tests.fairchem2.command_line import fairchem, fairchem_scd
from tests.fairchem2.support import UMA, UNIT, crystals, element_references, model_config, tasks_config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# The sample configs, smaller: what is tested is that the commands fit together.
SMALLER = {
    r"num_structures: 240": "num_structures: 16",
    r"num_structures: 48": "num_structures: 8",
    r"epochs: \d+": "epochs: 1",
    r"(sphere_channels|hidden_channels|edge_channels|num_distance_basis): 32": r"\1: 8",
    r"num_layers: 2": "num_layers: 1",
    r"cutoff: 5.0": "cutoff: 4.0",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each block that is meant to be run, in order."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.S | re.M)
    return [(language, text) for language, text in found if "pip install" not in text]


def follow(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "uv":
        assert words[:4] == ["uv", "run", "--project", "hosts/fairchem2"], f"a command that cannot be copied: {command}"
        words = words[4:]
    if words[0] == "fairchem-scd":
        fairchem_scd(*words[1:])
    elif words[2:3] == ["benchmarks.fairchem2.step_cost"]:
        # An hour as it stands. Tried are the options, and one small model in the place of all.
        options = step_cost._parse(words[3:])
        step_cost.main(["--quick", "--kinds", options.kinds[0], "--experts", str(options.experts[0])])
    elif words[:2] == ["python", "-m"]:
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, text=True)
    else:
        assert words[0] == "fairchem"
        fairchem(*words[1:])


def run_page(page: str) -> None:
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), {})
            continue
        for command in text.strip().splitlines():
            follow(command)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What a reader has: the configs, and nothing else."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for path in (tmp_path / "configs" / "fairchem2").rglob("*.y*ml"):
        text = path.read_text()
        for long, short in SMALLER.items():
            text = re.sub(long, short, text)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_about_fairchem_2_runs_from_top_to_bottom(clone, capsys):
    run_page("fairchem2")
    printed = capsys.readouterr().out
    assert re.search(r"^-?\d+\.\d+$", printed, re.MULTILINE)  # the energy
    assert "| direct | 0 | 26 atoms | SCD, beside labels |" in printed
    assert (clone / "val.npz").is_file()


# --- fine-tuning UMA --------------------------------------------------------------------------------------------------


def uma_checkpoint(path: Path) -> None:
    """A small checkpoint of UMA's shape: experts, several data sets, one wrapped head for energy, forces and stress."""
    datasets = ("oc20", "omat", "omol")
    head = {
        "module": f"{UMA}.escn_moe.DatasetSpecificMoEWrapper",
        "dataset_mapping": {name: name for name in datasets},
        "head_cls": f"{UMA}.escn_md.MLP_EFS_Head",
        "head_kwargs": {"wrap_property": False},
    }
    config = model_config(
        direct=False,
        stress=True,
        experts=4,
        heads={"energyandforcehead": head},
        datasets=datasets,
        moe_dropout=0.05,
        use_composition_embedding=True,
        max_num_elements=100,
    )
    torch.manual_seed(0)
    weights = hydra.utils.instantiate(config).state_dict()
    average = {"n_averaged": torch.tensor(1), **{f"module.{name}": value for name, value in weights.items()}}
    torch.save(MLIPInferenceCheckpoint(config, weights, average, tasks_config(stress=True)), path)


def templates(folder: Path) -> None:
    """Templates as fairchem's repository has them, for the script that fills them in; on a CPU, and for two steps."""
    (folder / "data").mkdir(parents=True)
    name = "uma_conserving_data_task_energy_force_stress"
    (folder / "data" / f"{name}.yaml").write_text(yaml.safe_dump(_data_template(), sort_keys=False))
    (folder / "uma_sm_finetune_template.yaml").write_text(yaml.safe_dump(_run_template(), sort_keys=False))


def _data_template() -> dict:
    data = {"format": "ase_db", "a2g_args": {"max_neigh": "${max_neighbors}", "radius": "${cutoff_radius}"}}
    named = {"dataset_name": "${data.dataset_name}"}
    transforms = {"common_transform": named, "stress_reshape_transform": named}
    tasks = tasks_config(stress=True)
    for task in tasks:
        task["normalizer"]["rmsd"] = "${data.normalizer_rmsd}"
        task["datasets"] = ["${data.dataset_name}"]
    references = element_references()
    references["element_references"]["_args_"] = ["${data.elem_refs}"]
    tasks[0]["element_references"] = references
    return {
        "dataset_name": "??",
        "elem_refs": "??",
        "normalizer_rmsd": "??",
        "train_dataset": {"splits": {"train": {"src": "??"}}, **data, "transforms": transforms},
        "val_dataset": {"splits": {"val": {"src": "??"}}, **data, "transforms": transforms},
        "tasks_list": tasks,
    }


def _run_template() -> dict:
    return {
        "defaults": [{"data": "uma_conserving_data_task_template"}, "_self_"],
        "job": {
            "device_type": "CPU",
            "scheduler": {"mode": "LOCAL", "ranks_per_node": 1},
            "debug": True,
            "run_dir": "/tmp/uma_finetune_runs/",
            "run_name": "uma_finetune",
        },
        "base_model_name": "uma-s-1",
        "max_neighbors": 20,
        "cutoff_radius": 4,
        "train_dataset": _dataset("train"),
        "train_dataloader": _loader("train"),
        "val_dataset": _dataset("val"),
        "eval_dataloader": _loader("val"),
        "runner": {
            "_target_": "fairchem.core.components.train.train_runner.TrainEvalRunner",
            "train_dataloader": "${train_dataloader}",
            "eval_dataloader": "${eval_dataloader}",
            "train_eval_unit": _unit_template(),
            "max_epochs": None,
            "max_steps": 2,
            "evaluate_every_n_steps": 2,
            "callbacks": [
                {
                    "_target_": "fairchem.core.components.train.train_runner.TrainCheckpointCallback",
                    "checkpoint_every_n_steps": 1,
                    "max_saved_checkpoints": 5,
                }
            ],
        },
    }


def _unit_template() -> dict:
    scheduler = {"warmup_factor": 0.2, "warmup_epochs": 0.01, "lr_min_factor": 0.01, "epochs": None, "steps": 2}
    checkpoint = "fairchem.core.calculate.pretrained_mlip.pretrained_checkpoint_path_from_name"
    return {
        "_target_": f"{UNIT}.MLIPTrainEvalUnit",
        "job_config": "${job}",
        "tasks": "${data.tasks_list}",
        "model": {
            "_target_": f"{UNIT}.initialize_finetuning_model",
            "checkpoint_location": {"_target_": checkpoint, "model_name": "${base_model_name}"},
            "overrides": {
                "backbone": {"otf_graph": True, "max_neighbors": "${max_neighbors}", "regress_stress": True},
                "pass_through_head_outputs": True,
            },
            "heads": {"energyandforcehead": {"module": f"{UMA}.escn_md.MLP_EFS_Head"}},
        },
        "optimizer_fn": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 4e-4, "weight_decay": 1e-3},
        "cosine_lr_scheduler_fn": {"_target_": f"{UNIT}._get_consine_lr_scheduler", "_partial_": True, **scheduler},
        "print_every": 1,
        "clip_grad_norm": 100,
    }


def _dataset(split: str) -> dict:
    return {
        "_target_": "fairchem.core.datasets.mt_concat_dataset.create_concat_dataset",
        "dataset_configs": {"DATASET_NAME": f"${{data.{split}_dataset}}"},
        "combined_dataset_config": {"sampling": {"type": "temperature", "temperature": 1.0}},
    }


def _loader(split: str) -> dict:
    sampler = "fairchem.core.datasets.samplers.max_atom_distributed_sampler.MaxAtomDistributedBatchSampler"
    return {
        "_target_": "fairchem.core.components.common.dataloader_builder.get_dataloader",
        "dataset": f"${{{split}_dataset}}",
        "batch_sampler_fn": {"_target_": sampler, "_partial_": True, "max_atoms": 14, "shuffle": True, "seed": 0},
        "num_workers": 0,
        "collate_fn": {"_target_": f"{UNIT}.mt_collater_adapter", "tasks": "${data.tasks_list}"},
    }


def test_the_page_about_uma_runs_from_a_folder_of_structures_to_a_calculator(tmp_path, monkeypatch, capsys):
    for split, structures in (("train", crystals(8)), ("val", crystals(4, seed=50))):
        (tmp_path / split).mkdir()
        for i, atoms in enumerate(structures):
            write_structures(tmp_path / split / f"{i}.traj", atoms)
    repository = tmp_path / "fairchem"
    templates(repository / "configs" / "uma" / "finetune")
    uma_checkpoint(tmp_path / "uma.pt")
    monkeypatch.chdir(repository)
    named = []

    def released(model_name: str) -> str:
        named.append(model_name)
        return str(tmp_path / "uma.pt")

    monkeypatch.setattr(pretrained_mlip, "pretrained_checkpoint_path_from_name", released)
    for language, text in blocks("fine-tuning-uma"):
        if language == "python":
            exec(compile(text, "fine-tuning-uma", "exec"), {})
            continue
        for command in text.strip().splitlines():
            if not command.startswith(("git ", "cd ")):
                follow(command)
    assert set(named) == {"uma-s-1p2"}
    energy = float(capsys.readouterr().out.splitlines()[-1].split()[0])
    assert energy == energy
    final = torch.load("runs/uma_scd/checkpoints/final/inference_ckpt.pt", weights_only=False)
    assert not [name for name in final.model_state_dict if "denoising" in name]
