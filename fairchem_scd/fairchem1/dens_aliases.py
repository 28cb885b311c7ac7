"""DeNS settings in the words of its authors' configs and of fairchem's own DeNS trainer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from fairchem_scd.errors import ConfigError

_RENAMED = {"prob": "prob", "corrupt_ratio": "corrupt_ratio", "all_atoms": "all_atoms"}
_SCHEDULE = ("num_steps", "std_low", "std_high")


def denoising_block(task: Mapping[str, Any], optim: Mapping[str, Any], dens: Mapping[str, Any]) -> dict[str, Any]:
    """The `task.denoising` block of a config, whoever's words it is written in.

    Args:
        task: the config's `task` block.
        optim: its `optim` block, which may carry `use_denoising_pos`, `denoising_pos_params` and
            `denoising_pos_coefficient`.
        dens: what the model block said of DeNS.

    Raises:
        ConfigError: both ways are used at once, or a key is not known.
    """
    close = [] if "denoising" in task else difflib.get_close_matches("denoising", list(task), n=1, cutoff=0.8)
    if close:
        raise ConfigError(f"task.{close[0]}: unknown key; did you mean 'denoising'?")
    block = task.get("denoising")
    theirs = optim.get("use_denoising_pos", False)
    if block is not None and not isinstance(block, Mapping):
        raise ConfigError(f"task.denoising: expected a block with a task, such as 'dens: {{}}' (got {block!r})")
    if block is not None and theirs:
        raise ConfigError("task.denoising and optim.use_denoising_pos both set up denoising; keep one of them")
    block = dict(block or {})
    if theirs:
        block["dens"] = _authors_dens(optim)
    if dens and block.get("dens") is not None:
        block["dens"] = {**dens, **block["dens"]}
    return block


def _authors_dens(optim: Mapping[str, Any]) -> dict[str, Any]:
    # Their files write `None` where YAML's null was meant, which reads as a string.
    params = {
        key: None if value == "None" else value for key, value in (optim.get("denoising_pos_params") or {}).items()
    }
    known = {*_RENAMED, *_SCHEDULE, "fixed_noise_std", "std"}
    unknown = sorted(set(params) - known)
    if unknown:
        raise ConfigError(
            f"optim.denoising_pos_params.{unknown[0]}: unknown key; known keys: {', '.join(sorted(known))}"
        )
    if "prob" not in params:
        raise ConfigError("optim.denoising_pos_params.prob: missing; the share of steps that denoise")
    dens = {ours: params[theirs] for theirs, ours in _RENAMED.items() if theirs in params}
    # Absent, theirs moves every atom; ours every second one.
    dens.setdefault("corrupt_ratio", None)
    sigma = ("std",) if params.get("fixed_noise_std", False) else _SCHEDULE
    for key in sigma:
        if params.get(key) is None:
            kind = "a fixed σ" if sigma == ("std",) else "a noise schedule (fixed_noise_std is not true)"
            raise ConfigError(f"optim.denoising_pos_params.{key}: missing; {kind} needs {', '.join(sigma)}")
        dens[key] = params[key]
    if optim.get("denoising_pos_coefficient") is None:
        raise ConfigError("optim.denoising_pos_coefficient: missing; the weight of the denoising term")
    dens["coefficient"] = optim["denoising_pos_coefficient"]
    return dens
