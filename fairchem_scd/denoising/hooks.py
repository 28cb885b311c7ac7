"""Hooks that last for one pass, with which adapters change what a backbone computes.

A hook changes the inputs or the output of one module. All of these are context managers, and on leaving them, by an
exception too, the backbone is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

State = TypeVar("State")


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove the hooks on leaving, by an exception too."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def changed_inputs(module: nn.Module, change: Callable[..., tuple[Any, ...]]) -> AbstractContextManager[None]:
    """While entered, the module gets other inputs.

    Args:
        module: any module.
        change: is called with the positional arguments of each call, and returns those that the module gets instead.
    """
    return hooked(module.register_forward_pre_hook(lambda _, args: change(*args)))


def changed_output(module: nn.Module, change: Callable[[Any], Any]) -> AbstractContextManager[None]:
    """While entered, the module returns something else.

    Args:
        module: any module.
        change: is called with what the module returned, and returns what its caller gets instead.
    """
    return hooked(module.register_forward_hook(lambda _, args, output: change(output)))


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """While entered, collect in a list what each call of the module returns."""
    outputs: list[Any] = []
    with hooked(module.register_forward_hook(lambda _, args, output: outputs.append(output))):
        yield outputs


def with_scalars(embedding: Tensor, rows: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of spherical-harmonic coefficients with other l = 0 features.

    Args:
        embedding: [N, K, C] coefficients.
        rows: the l = 0 row of each of R resolutions.
        change: a function of the l = 0 features [N, R·C] of all resolutions, in the order of `rows`, that returns the
            new ones [N, R·C].

    Returns:
        [N, K, C].
    """
    # Copies of these rows, because backward would keep the whole embedding for views of them. The rows are plain
    # numbers, because a tensor of indices would have to be sent to the device.
    scalars = torch.cat([embedding[:, row] for row in rows], dim=1)
    changed = embedding.clone()
    for row, value in zip(rows, change(scalars).chunk(len(rows), dim=1), strict=True):
        changed[:, row] = value
    return changed


# --- activation checkpointing -----------------------------------------------------------------------------------------
# Activation checkpointing runs a module a second time, in backward. By then the hooks of its pass have been removed and
# other passes may have run. The module must nevertheless compute exactly what it computed in its own pass.


class RecomputeInContext:
    """Stands for a module that activation checkpointing runs, and enters the given contexts around each run of it.

    The host hands this object to activation checkpointing in place of the module, which therefore runs in the same
    contexts in the pass and in backward.

    Args:
        run: the module, or a function.
        contexts: functions that each make a context.
    """

    def __init__(self, run: Callable[..., Any], *contexts: Callable[[], AbstractContextManager[Any]]) -> None:
        self.run, self.contexts = run, contexts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            return self.run(*args, **kwargs)


Again = RecomputeInContext  # its former name, for adapters outside this package


class StateOfPass(Generic[State]):
    """What a backbone stores in itself during a pass and overwrites in the next, such as the rotations of its edges.

    One object belongs to one pass.

    Args:
        read: returns the state that the backbone has now.
        write: gives the backbone a state.
    """

    def __init__(self, read: Callable[[], State], write: Callable[[State], None]) -> None:
        self._read, self._write = read, write
        self._kept: State | None = None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """While entered, the backbone has the state of this pass, whichever pass ran last.

        It must be entered during the pass for the first time: the state of that moment is kept.
        """
        latest = self._read()
        if self._kept is None:
            self._kept = latest
        self._write(self._kept)
        try:
            yield
        finally:
            self._write(latest)


@contextmanager
def replaced(module: nn.Module, name: str, stand_in: Any) -> Iterator[None]:
    """While entered, an attribute of the module is something else.

    It may be a submodule, which stays registered: parameters and their names, state dict and hooks do not change. This
    works because Python finds an entry in the object's own `__dict__` before nn.Module looks among its submodules.
    `setattr` would not do: nn.Module's own takes no plain object in place of a submodule.
    """
    object.__setattr__(module, name, stand_in)
    try:
        yield
    finally:
        object.__delattr__(module, name)
