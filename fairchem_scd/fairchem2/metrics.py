"""Terms of the loss and errors, collected without waiting for the device, for the host's logger and the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fairchem_scd.denoising.ranks import gathered


class Measured:
    """Sums and counts by name, of one step or of many. What is summed stays on its device until it is read."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor | int]] = {}

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add a sum over `count` items, without its gradient."""
        summed, counted = self._sums.get(name, (0.0, 0))
        self._sums[name] = summed + total.detach().double(), counted + count

    def add_term(self, name: str, value: Tensor) -> None:
        """Add a term of the loss of one step. Terms of one name are summed, not averaged."""
        self.add(name, value, 0 if name in self._sums else 1)

    def add_errors(self, name: str, errors: Tensor, mask: Tensor) -> None:
        """Add errors [n] or [n, d] of some rows, by a mask [n]; or of some elements, by a mask as large."""
        mask = mask.view_as(errors) if mask.numel() == errors.numel() else mask[:, None].expand_as(errors)
        self.add(name, torch.where(mask, errors.detach(), 0.0).sum(), mask.sum())

    def update(self, other: Measured) -> None:
        """Add all that another one has."""
        for name, (total, count) in other._sums.items():
            self.add(name, total, count)

    def sums(self) -> dict[str, tuple[float, int]]:
        """Sum and count of each name. Waits for the device, once."""
        if not self._sums:
            return {}
        pairs = [torch.stack([total, torch.as_tensor(count).to(total)]) for total, count in self._sums.values()]
        read = torch.stack(pairs).tolist()
        return {name: (total, round(count)) for name, (total, count) in zip(self._sums, read, strict=True)}

    def means(self) -> dict[str, float]:
        """The mean of each name that has any item."""
        return _means(self.sums())

    def means_of_all_ranks(self) -> dict[str, float]:
        """The mean over the items of all ranks. A collective call."""
        whole: dict[str, tuple[float, int]] = {}
        for sums in gathered(self.sums()):
            for name, (total, count) in sums.items():
                summed, counted = whole.get(name, (0.0, 0))
                whole[name] = summed + total, counted + count
        return _means(whole)


class HostLogger(Protocol):
    def log(self, update_dict: dict[str, Any], step: int | None = None, commit: bool = False) -> None: ...


class LoggerWith:
    """The host's logger, which logs what a step measured in the same record as what it is given."""

    def __init__(self, logger: HostLogger, measured: Measured) -> None:
        self.logger, self.measured = logger, measured

    def log(self, update_dict: dict[str, Any], **how: Any) -> None:
        self.logger.log({**update_dict, **prefixed("train", self.measured.means())}, **how)


def prefixed(split: str, values: Mapping[str, float]) -> dict[str, float]:
    """The values under names as the host's log has them."""
    return {f"{split}/{name}": value for name, value in values.items()}


def _means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count}
