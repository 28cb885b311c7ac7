"""What this package does not train on this host, each with its reason and what would be right."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

from fairchem.core.models.base import HydraModel
from fairchem.core.models.uma.escn_md_block import Edgewise
from fairchem.core.modules.loss import DDPMTLoss
from fairchem.core.units.mlip_unit import mlip_unit
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from fairchem.core.units.mlip_unit.mlip_unit import MLIPEvalUnit, MLIPTrainEvalUnit, Task
from torch import nn

from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.parse_settings import Denoising
from fairchem_scd.denoising.task_registry import task_names
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem2.backbones import adapter_for, known_backbones
from fairchem_scd.host import TESTED

UNIT = "runner.train_eval_unit"

_SIGNATURES: dict[Callable[..., Any], tuple[str, ...]] = {
    MLIPTrainEvalUnit.train_step: ("self", "state", "data"),
    MLIPTrainEvalUnit.eval_step: ("self", "state", "data"),
    MLIPTrainEvalUnit.on_train_start: ("self", "state"),
    MLIPTrainEvalUnit.on_train_end: ("self", "state"),
    MLIPTrainEvalUnit.on_eval_epoch_start: ("self", "state"),
    MLIPTrainEvalUnit.on_eval_epoch_end: ("self", "state"),
    MLIPTrainEvalUnit.save_state: ("self", "checkpoint_location"),
    MLIPTrainEvalUnit._execute_load_state: ("self", "checkpoint_location"),
    MLIPEvalUnit.eval_step: ("self", "state", "data"),
    mlip_unit.initialize_finetuning_model: ("checkpoint_location", "overrides", "heads", "strict"),
    mlip_unit.compute_loss: ("tasks", "predictions", "batch"),
    DDPMTLoss.forward: ("self", "input", "target", "mult_mask", "natoms"),
    DDPMTLoss.per_structure: ("self", "input", "mult_mask", "num_samples", "loss", "natoms"),
    HydraModel.forward: ("self", "data"),
    Edgewise.forward_chunk: (
        "self",
        "x_full",
        "x_original_shape",
        "x_edge",
        "edge_index",
        "wigner",
        "wigner_inv_envelope",
        "scatter_target",
        "ac_mole_start_idx",
    ),
    MLIPInferenceCheckpoint: ("model_config", "model_state_dict", "ema_state_dict", "tasks_config"),
}
"""What is overridden, called or replaced, with the names of its parameters."""

_COMPILED = {"EScAIPBackbone": "EScAIP", "AllScAIPBackbone": "AllScAIP"}


def check_host() -> None:
    """Check that the host is the one that this package was written for.

    Another minor version is warned of.

    Raises:
        ConfigError: a function that is overridden or called has other parameters than in the version tested.
    """
    installed = version("fairchem-core")
    for function, expected in _SIGNATURES.items():
        found = tuple(inspect.signature(function).parameters)
        if found != expected:
            raise ConfigError(
                f"fairchem-core {installed}: {function.__qualname__}({', '.join(found)}) was "
                f"({', '.join(expected)}) in {TESTED[2]}, which this version of fairchem-scd is made for; install "
                f"fairchem-core~={TESTED[2]}.0, or a fairchem-scd for {installed}"
            )
    if not installed.startswith(f"{TESTED[2]}."):
        logging.warning("fairchem-core %s: fairchem-scd was tested with %s", installed, TESTED[2])


def check_arguments(host: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key beside the denoising block that the host's unit does not know."""
    known = inspect.signature(MLIPTrainEvalUnit.__init__).parameters
    for name in set(host) - set(known):
        if name == "task" or name in task_names():
            raise ConfigError(f"{UNIT}.{name}: unknown; denoising tasks stand in {key_of()}, such as {key_of('scd')}")
        close = difflib.get_close_matches(name, ["denoising", *known], n=1)
        hint = f"did you mean '{close[0]}'?" if close else "the host's unit has no such argument"
        raise ConfigError(f"{UNIT}.{name}: unknown key; {hint}")


def check_run(job: Any, host: Mapping[str, Any]) -> None:
    """Raise ConfigError for ways of spreading a model over ranks with which passes cannot run."""
    if str(host.get("train_strategy", "ddp")).lower() == "fsdp":  # any other name is refused by the host
        raise ConfigError(
            f"{UNIT}.train_strategy: fsdp cannot start in fairchem-core {version('fairchem-core')} (it imports "
            "MOELinear, which is no longer there); use ddp, the default"
        )
    parallel = getattr(job, "graph_parallel", None)
    if parallel is not None and parallel.group_size > 1:
        raise ConfigError(
            f"job.graph_parallel.group_size: {parallel.group_size}: a pass of a denoising task needs all atoms of a "
            "structure on one rank; set it to 1"
        )


def check_settings(settings: Denoising, tasks: Mapping[str, DenoisingTask]) -> None:
    """Raise ConfigError for settings that only fairchem 1.x has."""
    absent = {
        key_of("drop_path"): settings.drop_path is not None and "the host's backbones have no drop path",
        key_of("drop_path_per"): settings.drop_path_per is not None and "the host's backbones have no drop path",
        key_of("repeat_cells"): settings.repeat_cells is not None and "make larger cells when you write the data",
        key_of("restart"): settings.restart
        and "to count steps from zero, start from an inference checkpoint by initialize_finetuning_model",
    }
    for name, task in tasks.items():
        for key in task.subset_settings:
            absent[key_of(name, key)] = "parts of a structure have no charge and spin of their own"
        if getattr(task.settings, "null_condition", "identity") == "mask_token":
            absent[key_of(name, "null_condition")] = "with mask_token checkpoints would not be plain; use identity"
    for key, reason in absent.items():
        if reason:
            raise ConfigError(f"{key}: only on fairchem 1.x: {reason}")


def check_model(model: nn.Module) -> None:
    """Raise ConfigError for a model that denoising passes cannot run on."""
    check_backbone(model)
    if not model.backbone.otf_graph:
        raise ConfigError(
            f"{UNIT}.model.backbone.otf_graph is false: a corrupted structure needs a graph of its own, not the "
            "data's; set otf_graph to true"
        )


def check_backbone(model: nn.Module) -> None:
    """Raise ConfigError for a model whose backbone and heads have no adapter."""
    backbone = getattr(model, "backbone", None)
    if backbone is None or not hasattr(model, "output_heads"):
        raise ConfigError(
            f"{UNIT}.model: {type(model).__name__} is no hydra; use fairchem.core.models.base.HydraModel, or "
            "initialize_finetuning_model"
        )
    compiled = next((_COMPILED[cls.__name__] for cls in type(backbone).__mro__ if cls.__name__ in _COMPILED), None)
    if compiled is not None:
        raise ConfigError(
            f"{UNIT}.model.backbone: {compiled} is compiled as a whole and has no features that rotate with the "
            "structure, so noise cannot be read off it; backbones that denoising trains: "
            + ", ".join(known_backbones())
        )
    try:
        adapter_for(backbone)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.backbone", f"{UNIT}.model.backbone", 1)) from None


def check_tasks(tasks: Mapping[str, DenoisingTask], trained: Iterable[Task]) -> None:
    """Raise ConfigError where the host's tasks lack what a denoising task needs.

    Args:
        tasks: the denoising tasks, by name.
        trained: the host's.
    """
    trained = list(trained)
    properties = {task.property for task in trained}
    if "dens" in tasks and "forces" not in properties:
        raise ConfigError(
            f"{UNIT}.tasks: none with property: forces, and {key_of('dens')} trains noise in their place; add one, or "
            f"use {key_of('scd')}"
        )
    names = properties | {task.name for task in trained}
    for task in tasks.values():
        task.check(sorted(names), sorted(names))
    for task in trained if "dens" in tasks else ():
        if task.property == "forces" and not isinstance(task.loss_fn, DDPMTLoss):
            raise ConfigError(
                f"{UNIT}.tasks: the loss_fn of {task.name} is {type(task.loss_fn).__name__}; {key_of('dens')} needs a "
                "fairchem.core.modules.loss.DDPMTLoss around it, which keeps the loss of each atom"
            )
