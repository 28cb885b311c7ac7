"""Bad rows in training on fairchem 2.x, where a step tells of them early and hears of those of other ranks late."""

from __future__ import annotations

import torch

from fairchem_scd.denoising.data_faults import DataFaults


class TrainingFaults(DataFaults):
    """The bad rows that a run has met, between two moments of each training step."""

    def __init__(self, *, skip: bool) -> None:
        super().__init__(skip=skip)
        self._ranks_affected: torch.Tensor | None = None

    def tell_ranks(self, device: torch.device) -> None:
        """Tell the other ranks whether this one has met what ends the run. A collective call.

        Nobody waits for the answer here: `stop_if_told` does.
        """
        self._ranks_affected = self.ranks_affected(device)

    def stop_if_told(self) -> None:
        """End the run if a rank said in this step that it must end. Waits for the device.

        Raises:
            DataError: one did; the message names the row.
        """
        told, self._ranks_affected = self._ranks_affected, None
        if told is not None and bool(told):
            self.stop_if_any()
