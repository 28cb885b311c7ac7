"""Rows that cannot be trained on: what makes one bad, and what a run does when it meets one.

`Guarded` puts the next good row in the place of a bad one, and leaves word of it in the batch. With
`on_bad_data: skip` the run counts it and goes on. With `on_bad_data: stop` all ranks end, with the row's name:

- In training every rank tells the others, once in each step, whether it met a bad row (`ranks_affected`, called after
  the loss). All know before the backward, so the row that came with it leaves no trace in the weights.
- In validation they tell each other once, after the last batch (`stop_if_any`).
- A run of one rank ends at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from fairchem.core.common import distutils
from torch import Tensor

from fairchem_scd.denoising.adapter import Adapter
from fairchem_scd.denoising.ranks import gathered
from fairchem_scd.errors import DataError
from fairchem_scd.fairchem1.data.guarded import check_row


class DataFaults:
    """The bad rows that a run has met.

    Args:
        skip: leave them out; otherwise they end the run.

    Attributes:
        left_out: how many this rank has left out.
        stops_at: what was wrong with the first row that ends the run, with its name; None: no such row was met here.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.left_out = 0
        self.stops_at: str | None = None

    def note(self, batch: Any) -> None:
        """Take notice of the bad rows of a batch.

        Raises:
            DataError: a row ends the run, and there is no other rank that has to know first.
        """
        found = [line for entry in getattr(batch, "bad_data", ()) for line in entry.splitlines()]
        if self.skip:
            for line in found:
                logging.warning("left out: %s", line)
            self.left_out += len(found)
        elif found:
            self.stops_at = found[0]
            if distutils.get_world_size() == 1:
                self.stop_if_any()

    def ranks_affected(self, device: torch.device) -> Tensor | None:
        """How many ranks have met a row that ends the run. A collective call.

        A scalar on the device, for the caller to read when it waits for the device anyway. None, and no call, where
        there is no other rank or no row ends the run.
        """
        if self.skip or distutils.get_world_size() == 1:
            return None
        return distutils.all_reduce(torch.full((), int(self.stops_at is not None), device=device))

    def stop_if_any(self) -> None:
        """End the run on all ranks if any of them has met a row that ends it. A collective call.

        Raises:
            DataError: one has; the message names the row.
        """
        for line in gathered(self.stops_at):
            if line is not None:
                raise DataError(f"{line}. With task.denoising.on_bad_data: skip such rows are left out")

    def report(self, device: torch.device) -> None:
        """Say how many rows all ranks have left out. A collective call."""
        left_out = distutils.all_reduce(self.left_out, device=device)
        if left_out:
            logging.warning("%d times a bad row was left out, and the next good one stood in for it", left_out)


def row_check(
    split: str, needed: Mapping[str, str], adapter: Adapter, optim: Mapping[str, Any]
) -> Callable[[Any], None]:
    """A function that raises ConfigError or DataError for a row that a run cannot train or be judged on.

    Args:
        split: "train" or "val".
        needed: for each label that is used, what asks for it.
        adapter: of the model's backbone.
        optim: the config's `optim` block, for the size of the batches.
    """
    backbone, batch_size = adapter.backbone, optim.get("batch_size", 1)
    if split == "val":
        batch_size = optim.get("eval_batch_size", batch_size)
    alone = "with optim.batch_size: 1 nothing else does" if batch_size == 1 else ""
    if not adapter.runs_lone_structures:
        alone = f"{adapter.names[0]} runs no structure without any"
    return partial(
        check_row,
        split=split,
        needed=needed,
        max_num_elements=adapter.max_num_elements,
        elements_key=adapter.elements_key,
        use_pbc=getattr(backbone, "use_pbc", True),
        cutoff=getattr(backbone, "cutoff", None),
        alone=alone,
    )
