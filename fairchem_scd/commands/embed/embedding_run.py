"""A trained model over rows of data: the l = 0 features of their atoms, and SCD's c."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fairchem.core.datasets import data_list_collater
from torch import Tensor
from torch_geometric.data import Data

from fairchem_scd.denoising.hooks import hooked
from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1.backbones import Adapter, adapter_for
from fairchem_scd.fairchem1.data.rows import check_batch, check_elements, name_of, neighbours_needed
from fairchem_scd.fairchem1.hydra import DenoisingHydra

INPUT = ("pos", "cell", "pbc", "natoms", "atomic_numbers", "tags", "fixed")
"""What models read of a row."""


class EmbeddingRun:
    """Runs a model over one batch of rows after the other.

    Args:
        model: from `load_model`. It is moved to the device, and its backbone's `use_pbc_single` is set.
        device: where to run.
        condition: make c too.
        of_subset: c is of some of a structure's atoms only.
    """

    def __init__(self, model: DenoisingHydra, device: torch.device, *, condition: bool, of_subset: bool) -> None:
        self.model, self.device, self.condition = model.to(device), device, condition
        self.adapter: Adapter = adapter_for(model.backbone)
        # The host then makes the graph of each structure by itself. In the graph of a whole batch, max_neighbors would
        # choose otherwise among neighbours at equal distances. It cannot do so for some of a structure's atoms.
        model.backbone.use_pbc_single = not of_subset

    def __call__(self, rows: Sequence[Any]) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """Each row with the features [n, C] of its n atoms and its c [C] or None; float32, on the CPU.

        Raises:
            ConfigError: out of memory.
            DataError: names a row that is broken, has elements beyond the model's table, or has features that are not
                finite.
        """
        for row in rows:
            check_batch(row, (), None)
            check_elements(row, self.adapter.max_num_elements, "the checkpoint was trained on other data")
        batch = _collated(rows).to(self.device)
        names = [name_of(row) for row in rows]
        try:
            with neighbours_needed(self.model.backbone, lambda: [(names, batch)], "--batch-size"):
                scalars, condition = self._forward(batch)
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(f"out of memory with {len(rows)} structures at a time; lower --batch-size") from error
        for i, (row, own) in enumerate(zip(rows, scalars.split([len(row.pos) for row in rows]), strict=True)):
            if not bool(own.isfinite().all()):
                raise DataError(f"{names[i]}: its features are not finite")
            yield row, own, None if condition is None else condition[i]

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Features [N, C] and c [B, C], under the same random numbers at every call."""
        returned: list[Any] = []
        handle = self.model.backbone.register_forward_hook(lambda module, args, out: returned.append(out))
        devices = [self.device] if self.device.type == "cuda" else []
        condition = None
        with torch.no_grad(), torch.random.fork_rng(devices), hooked(handle):
            torch.manual_seed(0)
            if self.condition:
                condition = self.model.embed(batch).float().cpu()
            # The pass that made c has the features too, unless it saw some of the atoms only.
            if not returned or len(self.adapter.scalars(returned[-1])) != len(batch.pos):
                self.model.features(batch)
        # Detached, since the host switches gradients on inside some backbones.
        return self.adapter.scalars(returned[-1]).detach().float().cpu(), condition


def _collated(rows: Sequence[Any]) -> Any:
    """The model's input of some rows, as the host's loader makes it."""
    keys = [key for key in INPUT if all(key in row and row[key] is not None for row in rows)]
    inputs = [Data(**{key: row[key] for key in keys}) for row in rows]
    for data in inputs:
        if "fixed" not in data:  # embeddings do not depend on it
            data.fixed = torch.zeros(len(data.pos))
    return data_list_collater(inputs, otf_graph=True)
