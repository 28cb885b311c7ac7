"""Which null form SCD's condition was trained with, by the keys of a state dict."""

from __future__ import annotations

from collections.abc import Iterable

from fairchem_scd.errors import ConfigError


def null_form(state_keys: Iterable[str]) -> str | None:
    """The null form by the keys of a state dict, "identity" or "mask_token"; None: there is no such condition."""
    keys = list(state_keys)
    if any(key.endswith("condition_head.mask_token") for key in keys):
        return "mask_token"
    return "identity" if any(".modulation." in key for key in keys) else None


def check_exportable(state_keys: Iterable[str]) -> None:
    """Raise ConfigError unless the plain model computes what the model of a state dict does without a condition."""
    if null_form(state_keys) == "mask_token":
        raise ConfigError(
            "trained with task.denoising.scd.null_condition: mask_token, which stands for the condition in every pass: "
            "the plain model computes something else. Where this package is installed it works as it is"
        )


def check_same_form(key: str, source: Iterable[str], target: Iterable[str]) -> None:
    """Check that weights mean the same in the model that they are loaded into: the null forms read them differently.

    Args:
        key: where the config or command names the checkpoint; begins the message.
        source: keys of the checkpoint's state dict.
        target: keys of the model's state dict.

    Raises:
        ConfigError: they do not.
    """
    trained, wanted = null_form(source), null_form(target)
    if trained == "mask_token" and wanted != "mask_token":
        raise ConfigError(
            f"{key}: its backbone was trained under a mask token in every pass; keep it with "
            "task.denoising.scd.null_condition: mask_token (prob: 0 if SCD itself is to stop)"
        )
    if trained == "identity" and wanted == "mask_token":
        raise ConfigError(
            f"{key}: trained with task.denoising.scd.null_condition: identity, and this config says mask_token; the "
            "two forms read their weights in different ways, so make them agree"
        )
