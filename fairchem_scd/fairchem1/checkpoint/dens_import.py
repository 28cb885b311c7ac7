"""DeNS checkpoints of other codes, the authors' and fairchem's, turned into this package's own or the plain host's.

Their encodings of forces and σ have a bias, which their models add to atoms in every pass, with a condition or without.
Here the bias goes into the element embedding, which the model adds to the same features of the same atoms. The rest of
an encoding is zero without a condition, so the plain model then computes what theirs did.
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
from fairchem_scd.fairchem1.checkpoint.stored_run import StoredRun, build_hydra, report_weights
from fairchem_scd.fairchem1.checkpoint.training_state import ADDED
from fairchem_scd.fairchem1.dens_aliases import denoising_block
from fairchem_scd.fairchem1.hydra import DenoisingHydra
from fairchem_scd.fairchem1.legacy import to_hydra

_EMBEDDING = "backbone.sphere_embedding.weight"
_REFERENCES = "backbone.energy_lin_ref"
_ENCODING = "denoising.dens.encoding"
_BIASES = (f"{_ENCODING}.force_bias", f"{_ENCODING}.sigma_bias")  # in the order in which their models add them
_HEAD = "denoising.dens.noise_head"
# Of the names that a hydra would have; StoredRun gives those to the weights of a legacy model.
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

    It knows the authors' legacy models (`equiformer_v2_dens`, `escn_dens`) and fairchem's hydras with the backbone
    `equiformer_v2_dens_backbone` or `esen_backbone_dens`.

    Args:
        checkpoint: as it was stored; not changed.
        plain: make it the plain host hydra's, without noise head and encodings.

    Returns:
        Weights and their moving average under this package's names, the biases of the encodings in the element
        embedding [elements, C]; normalisers; element references (those in the authors' model too, in the energy's
        unit); and the config in the host's present form, with the DeNS settings under `task.denoising.dens`.
        Optimiser, scheduler, epoch and step are left out: embedding and bias are two parameters there and one here.

    Raises:
        ConfigError: it is of no such model, or its weights are not those its config asks for.
    """
    run = StoredRun(checkpoint)
    named = _named(run)
    config, adds_references = _new_config(run, plain)
    model = build_hydra(HydraModel if plain else DenoisingHydra, config["model"])
    weights = {name: value for name, value in named.values() if name is not None}
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


def _named(run: StoredRun) -> dict[str, tuple[str | None, Tensor]]:
    """Name here and value of each entry of a state_dict, by its name there, in the order there.

    The name is None for a table that has no place here.
    """
    if any(key.startswith(ADDED) for key in run.weights):
        raise ConfigError("the checkpoint is this package's own already; `fairchem-scd export` makes it plain")
    if "backbone.force_embedding.weight" not in run.weights:
        raise ConfigError(
            f"the checkpoint is of no DeNS model (its model is '{run.model_block.get('name')}', and it has no weights "
            "force_embedding.*); one of a plain model needs no import: give it to --checkpoint as it is"
        )
    named: dict[str, tuple[str | None, Tensor]] = {}
    taken = set()
    for key, (name, value) in zip(run.stored_keys, run.weights.items(), strict=True):
        for pattern, replacement in _RENAMED:
            name = re.sub(f"^{pattern}", replacement, name)
        if name in taken:
            raise ConfigError(f"the checkpoint has two noise heads ({key} is of the second); DeNS has one")
        taken.add(name)
        if name == f"{_ENCODING}.force_weight":
            value = value.squeeze(-1)  # [lmax + 1, C, 1]
        elif name == f"{_ENCODING}.sigma_weight":
            value = value.t()  # [C, 1]
        # force_expand_index says which degree each coefficient has. It follows from the config.
        named[key] = (None if name == f"{_ENCODING}.force_expand_index" else name, value)
    return named


def _state(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of `model` from their weights by our names."""
    fresh, parameters = model.state_dict(), dict(model.named_parameters())
    endings = _endings(parameters)
    required = {*parameters, _BIASES[0], *(_BIASES[1:] if f"{_ENCODING}.sigma_weight" in weights else ())}
    # Weights that this model leaves out on purpose: all that is added, or an encoding that is off.
    left_out = f"{_ENCODING}." if isinstance(model, DenoisingHydra) else ADDED
    report_weights(
        "the checkpoint's weights are not those of the model in its config",
        {
            "missing": sorted(required - set(weights)),
            "not in that model": [
                key
                for key in weights
                if key not in fresh and not key.startswith(left_out) and key.rpartition(".")[2] in endings
            ],
            "of another shape": [key for key, v in weights.items() if key in fresh and v.shape != fresh[key].shape],
        },
    )
    folded = _with_biases_folded(weights)
    return {key: folded.get(key, value) for key, value in fresh.items()}  # tables may be missing; weights are all there


def _with_biases_folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the biases of the encodings, which are added to the element embedding."""
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
    """State of the host's moving average for the parameters of `model`, from the state for those of their model."""
    if state is None:
        return None
    parameters = dict(model.named_parameters())
    endings = _endings(parameters)
    # Their model has parameters that ours lacks, such as the biases. An ending tells them from tables.
    order = [
        name
        for key, (name, _) in named.items()
        if name is not None
        and (parameters[name].requires_grad if name in parameters else key.rpartition(".")[2] in endings)
    ]
    shadow = state["shadow_params"]
    if [value.numel() for value in shadow] != [weights[name].numel() for name in order]:
        logging.warning("the checkpoint's moving average does not fit its weights: it is left out and starts fresh")
        return None
    average = {name: value.reshape(weights[name].shape) for name, value in zip(order, shadow, strict=True)}
    folded = _with_biases_folded({**weights, **average})
    trainable = [folded[name] for name, parameter in parameters.items() if parameter.requires_grad]
    return {**state, "shadow_params": trainable, "collected_params": []}


def _endings(parameters: Mapping[str, Any]) -> set[str]:
    """The last parts of the names of parameters, such as "weight": no table of a model is called so."""
    return {name.rpartition(".")[2] for name in parameters}


# --- normalisers and references ---------------------------------------------------------------------------------------


def _normalizers(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of the config's outputs. That of the noise is left out: here it is a setting of the task."""
    stored = (checkpoint.get("normalizers") or {}).items()
    return {_OLD_TARGETS.get(key, key): value for key, value in stored if key != "denoising_pos_target"}


def _element_references(weights: Mapping[str, Tensor], normalizers: Mapping[str, Any]) -> dict[str, Tensor]:
    """References [119] by atomic number. The host adds them to a denormalised energy, their model before that."""
    energy = normalizers.get("energy") or {}
    unit = torch.as_tensor(energy.get("rmsd", energy.get("std", 1.0)))
    references = torch.zeros(119)  # the host's own size
    references[: len(weights[_REFERENCES])] = weights[_REFERENCES] * unit
    return {"element_references": references}


# --- config ---------------------------------------------------------------------------------------------------------


def _new_config(run: StoredRun, plain: bool) -> tuple[dict[str, Any], bool]:
    """The config in the host's present form, and whether the model added references to its energy."""
    setup_imports()  # all of the host's models and heads, by name
    if not isinstance(run.checkpoint["config"].get("model"), (str, Mapping)):
        raise ConfigError("the checkpoint's config names no model, so nothing says what its weights are of")
    try:
        config = update_config(copy.deepcopy(run.config))
    except (KeyError, NotImplementedError) as error:
        raise ConfigError(f"the checkpoint's config is in no form that fairchem knows ({error!r})") from error
    model = run.whole_model_block
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
