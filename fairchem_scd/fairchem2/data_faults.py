"""What a run does when it meets rows that cannot be trained on.

`Guarded` puts the next good row in the place of a bad one, and leaves word of it in the batch. With
`on_bad_data: skip` the run counts it and goes on, unless too many bad rows follow each other. With `on_bad_data: stop`
and there, all ranks end, with the row's name: in training before the row that came with it changes the weights, in
validation after the last batch.
"""

from __future__ import annotations

import logging

import torch
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData

from fairchem_scd.denoising.ranks import gathered
from fairchem_scd.errors import DataError
from fairchem_scd.fairchem2.rows import with_advice


class DataFaults:
    """The bad rows that a run has met.

    Args:
        skip: leave them out; otherwise they end the run.

    Attributes:
        left_out: how many this rank has left out.
        stops_at: why the run ends, with the name of a row; None: nothing that ends it was met here.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.left_out = 0
        self.stops_at: str | None = None
        self._ranks_affected: torch.Tensor | None = None

    def note(self, data: AtomicData) -> None:
        """Take notice of the bad rows of a batch.

        Raises:
            DataError: they end the run, and there is no other rank that has to know first.
        """
        ends = [line for line in data.get("no_good_row", ()) if line]
        found = [line for entry in data.get("bad_data", ()) for line in entry.splitlines()]
        if self.skip:
            for line in found:
                logging.warning("left out: %s", line)
            self.left_out += len(found)
        elif found:
            ends.append(with_advice(found[0]))
        if ends:
            self.stops_at = self.stops_at or ends[0]
            if distutils.get_world_size() == 1:
                self.stop_if_any()

    def tell_ranks(self, device: torch.device) -> None:
        """Tell the other ranks whether this one has met what ends the run. A collective call.

        Nobody waits for the answer here: `stop_if_told` does.
        """
        if distutils.get_world_size() > 1:
            mark = torch.full((), int(self.stops_at is not None), device=device)
            self._ranks_affected = distutils.all_reduce(mark)

    def stop_if_told(self) -> None:
        """End the run if a rank said in this step that it must end. Waits for the device.

        Raises:
            DataError: one did; the message names the row.
        """
        told, self._ranks_affected = self._ranks_affected, None
        if told is not None and bool(told):
            self.stop_if_any()

    def stop_if_any(self) -> None:
        """End the run on all ranks if any of them has met what ends it. A collective call.

        Raises:
            DataError: one has; the message names the row.
        """
        for line in gathered(self.stops_at):
            if line is not None:
                raise DataError(line)

    def report(self, device: torch.device) -> None:
        """Say how many rows all ranks have left out. A collective call."""
        left_out = distutils.all_reduce(self.left_out, device=device)
        if left_out:
            logging.warning("%d times a bad row was left out, and the next good one stood in for it", left_out)
