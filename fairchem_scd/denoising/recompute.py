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
Kind = tuple[torch.Size, torch.dtype]


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
        self._kinds: list[Kind] = []

    def first_run(self) -> Result:
        def note(slot: _Slot) -> None:
            self._slots.append(weakref.ref(slot))
            self._kinds.append(_kind(slot))

        with _saved_until_the_end(note, self._tensor):
            return self._function()

    def _tensor(self, slot: _Slot) -> Tensor:
        if slot.tensor is None:
            self._second_run()
        return slot.tensor

    def _second_run(self) -> None:
        kinds: list[Kind] = []

        def fill(made: _Slot) -> None:
            slot = self._slots[len(kinds)]() if len(kinds) < len(self._slots) else None
            kinds.append(_kind(made))
            if slot is not None:
                slot.tensor = made.tensor

        with self._surroundings.restored(), torch.enable_grad(), _saved_until_the_end(fill, lambda slot: slot.tensor):
            self._function()
        if kinds != self._kinds:
            at = next((i for i, pair in enumerate(zip(kinds, self._kinds)) if pair[0] != pair[1]), None)  # noqa: B905
            first = "" if at is None else f"; number {at} was {_said(self._kinds[at])} and is {_said(kinds[at])}"
            raise RuntimeError(
                "recompute_clean_pass: the model did not compute the same when the pass was run again in backward: "
                f"{len(self._kinds)} tensors were saved in the forward and {len(kinds)} in the second run{first}. "
                "Set recompute_clean_pass to false for this model"
            )


@contextmanager
def _saved_until_the_end(note: Callable[[_Slot], None], read: Callable[[_Slot], Tensor]) -> Iterator[None]:
    """While entered, what autograd saves is in slots, which are empty afterwards.

    Args:
        note: is called with each new slot.
        read: is called where autograd asks for the tensor of a slot, which may be later.
    """
    slots: list[weakref.ref[_Slot]] = []

    def keep(tensor: Tensor) -> _Slot:
        slot = _Slot(tensor.detach())  # an output that its own node saves would hold itself alive otherwise
        slots.append(weakref.ref(slot))
        note(slot)
        return slot

    with saved_tensors_hooks(keep, read):
        yield
    # Emptied, not only left alone: a backbone may keep a reference to its latest result, and with it to the graph.
    for reference in slots:
        slot = reference()
        if slot is not None:
            slot.tensor = None


def _kind(slot: _Slot) -> Kind:
    return slot.tensor.shape, slot.tensor.dtype


def _said(kind: Kind) -> str:
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
            if torch.amp.is_autocast_available(kind)
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
        # A module such as torch.cuda; of the CPU there is one too, without states.
        self._generators = None if device.type == "cpu" else getattr(torch, device.type, None)
        self._cpu = torch.get_rng_state()
        self._device = None if self._generators is None else self._generators.get_rng_state(device)

    def set(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._generators is not None:
            self._generators.set_rng_state(self._device, device=self.device)
