"""Checkpoints of other DeNS codes, as this package's own or as the plain host's: the authors' and fairchem's.

Their encodings of forces and σ have a bias, which stands in every pass, whether or not anything is told. It is added to
the element embedding here, which enters the same features of the same atoms; what is left of the encodings is silent
without a condition, so that the plain model computes what theirs does.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from fairchem.core.common.utils import setup_imports, update_config
from fairchem.core.models.base import HydraModel
from torch import Tensor, nn

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.checkpoint.source import ADDED, bare, model_config, trainable, whole
from fairchem_scd.fairchem1.dens_aliases import denoising_block
from fairchem_scd.fairchem1.hydra import DenoisingHydra
from fairchem_scd.fairchem1.legacy import hydra_key, to_hydra

_EMBEDDING = "backbone.sphere_embedding.weight"
_REFERENCES = "backbone.energy_lin_ref"
_ENCODING = "denoising.dens.encoding"
_BIASES = (f"{_ENCODING}.force_bias", f"{_ENCODING}.sigma_bias")  # in the order in which their models add them
_HEAD = "denoising.dens.noise_head"
# By the names of a hydra; those of a one-piece model become so first.
_RENAMED = (
    (r"backbone\.force_embedding\.", f"{_ENCODING}.force_"),
    (r"backbone\.noise_schedule_sigma_embedding\.", f"{_ENCODING}.sigma_"),
    (r"(?:backbone|output_heads\.[^.]+)\.denoising_pos_block\.", f"{_HEAD}.force_block."),
    (r"output_heads\.[^.]+\.denoising_linear\.", f"{_HEAD}.linear."),
    (r"(output_heads\.[^.]+)\.scalar_block\.", r"\1.energy_block."),
    (r"(output_heads\.[^.]+)\.vector_block\.", r"\1.force_block."),
)
_THEIR_SETTINGS = ("use_denoising_pos", "denoising_pos_params", "denoising_pos_coefficient")
_OLD_TARGETS = {"target": "energy", "grad_target": "forces"}


def from_dens(checkpoint: Mapping[str, Any], *, plain: bool = False) -> dict[str, Any]:
    """Turn a DeNS checkpoint of another code into one of this package.

    Known are the authors' one-piece models (`equiformer_v2_dens`, `escn_dens`) and fairchem's hydras with the backbone
    `equiformer_v2_dens_backbone` or `esen_backbone_dens`.

    Args:
        checkpoint: as it was stored; not changed.
        plain: make it the plain host hydra's, without noise head and encodings.

    Returns:
        Weights and their moving average under this package's names, the biases of the encodings in the element
        embedding [elements, C]; normalisers; element references (those in the authors' model too, in the energy's
        unit); and the config in the host's present form, the source's DeNS settings under `task.denoising.dens`.
        Optimiser, scheduler, epoch and step are left out: two of their parameters are one here.

    Raises:
        ConfigError: it is of no such model, or its weights are not those its config asks for.
    """
    named = _named(checkpoint)
    config, adds_references = _new_config(checkpoint, plain)
    model = _built(config["model"], HydraModel if plain else DenoisingHydra)
    weights = {ours: value for ours, value in named.values() if ours is not None}
    imported = {
        "state_dict": _state(weights, model),
        "normalizers": _normalizers(checkpoint),
        "elementrefs": dict(checkpoint.get("elementrefs") or {}),
        "config": config,
        "val_metrics": checkpoint.get("val_metrics"),
        "amp": None,
    }
    if adds_references:
        imported["elementrefs"]["energy"] = _element_references(weights, imported["normalizers"])
    if "ema" in checkpoint:
        imported["ema"] = _average(checkpoint["ema"], named, weights, model)
    return imported


# --- weights ----------------------------------------------------------------------------------------------------------


def _named(checkpoint: Mapping[str, Any]) -> dict[str, tuple[str | None, Tensor]]:
    """Name here and value of each entry of a state_dict, by its name there, in the order there."""
    theirs = {bare(key): value for key, value in checkpoint["state_dict"].items()}
    if any(key.startswith(ADDED) for key in theirs):
        raise ConfigError("the checkpoint is this package's own already; `fairchem-scd export` makes it plain")
    if not {"force_embedding.weight", "backbone.force_embedding.weight"} & set(theirs):
        raise ConfigError(
            f"the checkpoint is of no DeNS model (its model is '{model_config(checkpoint).get('name')}', and it has no "
            "weights force_embedding.*); one of a plain model needs no import: give it to --checkpoint as it is"
        )
    legacy_heads = "force_embedding.weight" in theirs
    named: dict[str, tuple[str | None, Tensor]] = {}
    taken = set()
    for key, value in theirs.items():
        ours = hydra_key(key) if legacy_heads else key
        for pattern, name in _RENAMED:
            ours = re.sub(f"^{pattern}", name, ours)
        if ours in taken:
            raise ConfigError(f"the checkpoint has two noise heads ({key} is of the second); DeNS has one")
        taken.add(ours)
        if ours == f"{_ENCODING}.force_weight":
            value = value.squeeze(-1)  # [lmax + 1, C, 1]
        elif ours == f"{_ENCODING}.sigma_weight":
            value = value.t()  # [C, 1]
        # Which degree a coefficient has: a table, not a weight.
        named[key] = (None if ours == f"{_ENCODING}.force_expand_index" else ours, value)
    return named


def _state(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of `model` from their weights, by our names."""
    fresh, parameters = model.state_dict(), dict(model.named_parameters())
    learnt = _last_names(parameters)
    required = {*parameters, _BIASES[0], *(_BIASES[1:] if f"{_ENCODING}.sigma_weight" in weights else ())}
    # What theirs has and this model does without: all that is added, or an encoding that is off.
    idle = f"{_ENCODING}." if isinstance(model, DenoisingHydra) else ADDED
    unknown = [k for k in weights if k not in fresh and not k.startswith(idle) and k.rpartition(".")[2] in learnt]
    problems = {
        "missing": sorted(required - set(weights)),
        "not in that model": unknown,
        "of another shape": [key for key, value in weights.items() if key in fresh and value.shape != fresh[key].shape],
    }
    if any(problems.values()):
        raise ConfigError(
            "the checkpoint's weights are not those of the model in its config: "
            + "; ".join(f"{len(keys)} {what}, such as {keys[0]}" for what, keys in problems.items() if keys)
        )
    folded = _folded(weights)
    return {key: folded.get(key, value) for key, value in fresh.items()}  # a table may be missing, not a weight


def _folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights with the biases of the encodings in the element embedding instead."""
    folded = dict(weights)
    for bias in (folded.pop(name) for name in _BIASES if name in weights):
        if bias.shape != folded[_EMBEDDING].shape[1:]:
            raise ConfigError("the checkpoint is of a model with several resolutions, which DeNS does not run with")
        folded[_EMBEDDING] = folded[_EMBEDDING] + bias
    return folded


def _average(
    state: Mapping[str, Any] | None,
    named: Mapping[str, tuple[str | None, Tensor]],
    weights: Mapping[str, Tensor],
    model: nn.Module,
) -> dict[str, Any] | None:
    """The moving average, a list by position among trainable parameters, for another model's parameters."""
    if state is None:
        return None
    parameters = dict(model.named_parameters())
    learnt = _last_names(parameters)
    order = [
        ours
        for theirs, (ours, _) in named.items()
        if ours is not None
        and (parameters[ours].requires_grad if ours in parameters else theirs.rpartition(".")[2] in learnt)
    ]
    shadow = state["shadow_params"]
    if [value.numel() for value in shadow] != [weights[name].numel() for name in order]:
        logging.warning("the checkpoint's moving average does not fit its weights: it is left out and starts fresh")
        return None
    average = {name: value.reshape(weights[name].shape) for name, value in zip(order, shadow, strict=True)}
    folded = _folded({**weights, **average})
    return {**state, "shadow_params": [folded[name] for name in trainable(model)], "collected_params": []}


def _last_names(parameters: Mapping[str, Any]) -> set[str]:
    """What tells the name of a weight from that of a table derived from the config."""
    return {name.rpartition(".")[2] for name in parameters}


# --- normalisers and references ---------------------------------------------------------------------------------------


def _normalizers(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    # That of the noise is a setting of the task here.
    theirs = (checkpoint.get("normalizers") or {}).items()
    return {_OLD_TARGETS.get(key, key): value for key, value in theirs if key != "denoising_pos_target"}


def _element_references(weights: Mapping[str, Tensor], normalizers: Mapping[str, Any]) -> dict[str, Tensor]:
    """References [119] by atomic number, which the host adds to a denormalised energy; theirs is added before."""
    energy = normalizers.get("energy") or {}
    unit = torch.as_tensor(energy.get("rmsd", energy.get("std", 1.0)))
    references = torch.zeros(119)  # the host's own size
    references[: len(weights[_REFERENCES])] = weights[_REFERENCES] * unit
    return {"element_references": references}


# --- config ---------------------------------------------------------------------------------------------------------


def _new_config(checkpoint: Mapping[str, Any], plain: bool) -> tuple[dict[str, Any], bool]:
    """The config in the host's present form, and whether the model added references to its energy."""
    setup_imports()  # all of the host's models and heads, by name
    config = copy.deepcopy(dict(checkpoint["config"]))
    if isinstance(config.get("model"), str):  # before fairchem 1.0
        config["model"] = {"name": config["model"], **config.pop("model_attributes", {})}
    if not isinstance(config.get("model"), Mapping):
        raise ConfigError("the checkpoint's config names no model, so nothing says what its weights are of")
    try:
        config = update_config(config)
    except (KeyError, NotImplementedError) as error:
        raise ConfigError(f"the checkpoint's config is in no form that fairchem knows ({error!r})") from error
    model, _ = whole(config["model"])
    adds_references = bool(model.pop("use_energy_lin_ref", False))
    trains_energy = model.pop("use_denoising_energy", True)
    block, dens = to_hydra(model)
    if not trains_energy:
        dens["train_outputs"] = []
    optim, task = config.get("optim") or {}, dict(config.get("task") or {})
    if plain:
        block = {key: value for key, value in block.items() if key != "legacy_weight_decay"}
        block["name"] = "hydra"
    else:
        task["denoising"] = denoising_block({}, optim, dens) or {"dens": dens}
        block["denoising"] = copy.deepcopy(task["denoising"])
    new = {
        "trainer": "ocp",  # which the host's calculator builds; the source's own may not exist here
        "model": block,
        "task": task,
        "optim": {key: value for key, value in optim.items() if key not in _THEIR_SETTINGS},
        "dataset": {"src": None, **(config.get("dataset") or {})},  # the host's calculator deletes src
    }
    return {**config, **new}, adds_references


def _built(block: Mapping[str, Any], cls: type[HydraModel]) -> HydraModel:
    try:
        with torch.random.fork_rng(devices=[]):
            return cls(**{key: value for key, value in block.items() if key != "name"})
    except TypeError as error:
        raise ConfigError(f"the model in the checkpoint's config cannot be built here ({error})") from error
