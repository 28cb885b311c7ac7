"""New heads that start quietly.

A fresh head's last layer is random. The features of a pre-trained backbone are larger than fresh ones and differ more
between atoms, so there it makes large errors, and undoing them spoils a good start. With this layer zero a head begins
by predicting zero: after the normaliser and the references, the mean of what it is to predict.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fairchem_scd.denoising.adapter import Adapter


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
