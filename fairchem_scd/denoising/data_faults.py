"""What a run does when it meets rows that cannot be trained on, whatever its host.

A guard puts the next good row in the place of a bad one, and leaves word of it in the batch. With `on_bad_data: skip`
the run counts it and goes on. With `on_bad_data: stop` all ranks end, with the row's name, before the row that came
with it changes the weights; in validation after the last batch. A run of one rank ends at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.ranks import gathered, number_of_ranks
from fairchem_scd.errors import DataError


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

    def note(self, bad: Sequence[str], no_good: Sequence[str] = ()) -> None:
        """Take notice of the bad rows of a batch.

        Args:
            bad: by row of the batch, what was wrong with rows that it stands in for, a line each.
            no_good: by row of the batch, why none could stand in, which always ends the run; "": one did.

        Raises:
            DataError: they end the run, and there is no other rank that has to know first.
        """
        found = [line for entry in bad for line in entry.splitlines()]
        ends = [line for line in no_good if line]
        if self.skip:
            for line in found:
                logging.warning("left out: %s", line)
            self.left_out += len(found)
        elif found:
            ends.append(with_advice(found[0]))
        if ends:
            self.stops_at = self.stops_at or ends[0]
            if number_of_ranks() == 1:
                self.stop_if_any()

    def ranks_affected(self, device: torch.device) -> Tensor | None:
        """How many ranks have met what ends the run. A collective call.

        A scalar on the device, for the caller to read when it waits for the device anyway. None, and no call, where
        there is no other rank.
        """
        if number_of_ranks() == 1:
            return None
        affected = torch.full((), int(self.stops_at is not None), device=device)
        distributed.all_reduce(affected)
        return affected

    def stop_if_any(self) -> None:
        """End the run on all ranks if any of them has met what ends it. A collective call.

        Raises:
            DataError: one has; the message names the row.
        """
        for line in gathered(self.stops_at):
            if line is not None:
                raise DataError(line)

    def report(self) -> None:
        """Say how many rows all ranks have left out. A collective call."""
        left_out = sum(gathered(self.left_out))
        if left_out:
            logging.warning("%d times a bad row was left out, and the next good one stood in for it", left_out)


def with_advice(line: str) -> str:
    """What is wrong with a row, and what would let a run go on."""
    return f"{line}. With {key_of('on_bad_data')}: skip such rows are left out"
