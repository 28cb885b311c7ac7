"""Recomputation: what a function saves for backward is dropped after its run, and made again when backward needs it.

The technique is that of torch's non-reentrant activation checkpointing (`torch.utils.checkpoint.checkpoint` with
`use_reentrant=False`): the autograd graph stays as it is, and only the tensors that its nodes have saved are missing
until backward asks for the first of them. So gradients are the same as without it, and all that waits for them, such as
DDP, goes on as before.

One thing differs. Torch drops the tensors at once, so that a derivative which the function itself takes, such as forces
that are the gradient of the energy, would run the function again in its own middle, while its hooks are in place. Here
the tensors are kept until the function returns.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result")


def recomputed(function: Callable[[], Result], device: torch.device) -> Result:
    """Call a function, and keep nothing of what it saves for backward: backward calls it once more instead.

    The second run has the random numbers and the autocast of the first one. Nothing else may have changed: the function
    must read the same weights and data, and enter every context that it needs by itself.

    Args:
        function: takes no arguments.
        device: where it computes. Random numbers may be drawn there and on the CPU.

    Returns:
        What the function returns.

    Raises:
        RuntimeError: in backward, where the second run did not save the same tensors as the first.
    """
    return _Recomputation(function, device).first_run()


class _Slot:
    """Stands in the autograd graph for a tensor that one of its nodes has saved; None: it was dropped."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor


class _Recomputation(Generic[Result]):
    """The two runs of one function."""

    def __init__(self, function: Callable[[], Result], device: torch.device) -> None:
        self._function = function
        self._surroundings = _Surroundings(device)
        # In the order in which tensors were saved. A slot ends with the graph's node, and then needs no tensor.
        self._slots: list[weakref.ref[_Slot]] = []
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []

    def first_run(self) -> Result:
        def keep(tensor: Tensor) -> _Slot:
            slot = _Slot(tensor.detach())  # an output that its own node saves would hold itself alive otherwise
            self._slots.append(weakref.ref(slot))
            self._kinds.append((tensor.shape, tensor.dtype))
            return slot

        with saved_tensors_hooks(keep, self._tensor):
            result = self._function()
        for reference in self._slots:
            slot = reference()
            if slot is not None:
                slot.tensor = None
        return result

    def _tensor(self, slot: _Slot) -> Tensor:
        if slot.tensor is None:
            self._second_run()
        return slot.tensor

    def _second_run(self) -> None:
        kinds: list[tuple[torch.Size, torch.dtype]] = []

        def fill(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            slot = self._slots[len(kinds)]() if len(kinds) < len(self._slots) else None
            kinds.append((tensor.shape, tensor.dtype))
            if slot is not None:
                slot.tensor = tensor
            return tensor  # for derivatives that the function itself takes

        with self._surroundings.restored(), torch.enable_grad(), saved_tensors_hooks(fill, lambda tensor: tensor):
            self._function()
        if kinds != self._kinds:
            at = next((i for i, pair in enumerate(zip(kinds, self._kinds)) if pair[0] != pair[1]), None)  # noqa: B905
            first = "" if at is None else f"; number {at} was {_said(self._kinds[at])} and is {_said(kinds[at])}"
            raise RuntimeError(
                "recompute_clean_pass: the model did not compute the same when the pass was run again in backward: "
                f"{len(self._kinds)} tensors were saved in the forward and {len(kinds)} in the second run{first}. "
                "Set recompute_clean_pass to false for this model"
            )


def _said(kind: tuple[torch.Size, torch.dtype]) -> str:
    return f"{list(kind[0])} {kind[1]}"


class _Surroundings:
    """The random state and the autocast of the moment in which the object is made."""

    def __init__(self, device: torch.device) -> None:
        self._random = _RandomState(device)
        self._autocasts = [
            partial(
                torch.autocast,
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=torch.is_autocast_cache_enabled(),
            )
            for kind in sorted({"cpu", device.type})
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """While entered, they are as they were; afterwards as if nothing had happened."""
        now = _RandomState(self._random.device)
        with ExitStack() as stack:
            for autocast in self._autocasts:
                stack.enter_context(autocast())
            stack.callback(now.set)
            self._random.set()
            yield


class _RandomState:
    """The state of the random numbers of the CPU and of a device, at the moment in which the object is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generators = None if device.type == "cpu" else getattr(torch, device.type)  # such as torch.cuda
        self._cpu = torch.get_rng_state()
        self._device = None if self._generators is None else self._generators.get_rng_state(device)

    def set(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._generators is not None:
            self._generators.set_rng_state(self._device, device=self.device)
