"""What `embed` is asked for, on both hosts: of which kind the vectors are, and where the model runs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fairchem_scd.errors import ConfigError, first_line

Kind = Literal["auto", "features", "condition", "both"]
Pool = Literal["mean", "sum"]


def check_kind(kind: Kind, per_atom: bool) -> None:
    """Raise ConfigError where features of each atom are asked for, and none of structures that they belong to."""
    if per_atom and kind == "condition":
        raise ConfigError("c belongs to a structure, not to its atoms: per-atom needs the features or both")


def vectors(scalars: Tensor, c: Tensor | None, kind: Kind, pool: Pool, per_atom: bool) -> dict[str, Any]:
    """What was asked for of one structure, by the names of `Embeddings`.

    Args:
        scalars: [n, C] features of its atoms, on the CPU.
        c: [C] its condition, if it was made.
    """
    made = {} if c is None else {"condition": c.numpy()}
    if kind != "condition":
        made["features"] = getattr(scalars, pool)(dim=0).numpy()
    if per_atom:
        made["atom_features"] = scalars.numpy()
    return made


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of that name; None: the first GPU if there is one. Raises ConfigError where it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {first_line(error)}") from error
    return device
