"""New heads that start quietly.

A fresh head's last layer is random. The features of a pre-trained backbone are larger than fresh ones and differ more
between atoms, so there it makes large errors, and undoing them spoils a good start. With this layer zero a head begins
by predicting zero: after the normaliser and the references, the mean of what it is to predict.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from fairchem_scd.denoising.adapter import Adapter
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.errors import ConfigError


@torch.no_grad()
def quieten(heads: Mapping[str, nn.Module], adapter: Adapter, *, readout: bool) -> list[str]:
    """Set to zero the last layers that the scalar outputs of heads come from, in place. Vectors stay as they are.

    Args:
        heads: by name.
        adapter: of the backbone that they read.
        readout: also where these layers belong to the backbone. False: those have been trained, and stay.

    Returns:
        The names of the heads that now predict zero.
    """
    of_backbone = set(adapter.backbone.modules())
    found = []
    for name, head in heads.items():
        layers = [layer for layer in adapter.scalar_layers(head) if readout or layer not in of_backbone]
        for layer in layers:
            for parameter in layer.parameters():
                parameter.zero_()
        found += [name] if layers else []
    return found


def say_which(quiet: Sequence[str], heads: Iterable[str], *, place: str, asked: bool) -> None:
    """Log which heads start quietly.

    Args:
        quiet: what `quieten` returned.
        heads: names of all that the model has.
        place: where the config has them.
        asked: the config asks for quiet heads by name.

    Raises:
        ConfigError: it does, and there are none.
    """
    if quiet:
        logging.info("heads that start quietly, with a last layer of zeros: %s", ", ".join(quiet))
        return
    none = f"none of {place} is a new one of scalars whose last layer is known: {', '.join(heads)}"
    if asked:
        raise ConfigError(f"{key_of('quiet_heads')}: {none}; leave quiet_heads out")
    logging.info("no head starts quietly: %s", none)
