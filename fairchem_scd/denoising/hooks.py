"""Hooks that live for a pass, for adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove hooks on the way out, exceptions included."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_scalars(embedding: Tensor, rows: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of spherical coefficients with other l = 0 features.

    Args:
        embedding: [N, K, C] coefficients.
        rows: the l = 0 row of each of R resolutions.
        change: [N, R·C] to [N, R·C], in the order of rows.
    """
    # A copy of these rows alone: a view would keep all of the embedding for backward. Plain numbers as indices, since a
    # tensor of them would have to be sent to the device.
    scalars = torch.cat([embedding[:, row] for row in rows], dim=1)
    changed = embedding.clone()
    for row, value in zip(rows, change(scalars).chunk(len(rows), dim=1), strict=True):
        changed[:, row] = value
    return changed


class RecomputeInContext:
    """Stands in for a block during a pass, so that activation checkpointing runs it again as in that pass.

    Args:
        block: what to run.
        contexts: each makes a context, to run it in.
    """

    def __init__(self, block: nn.Module, *contexts: Callable[[], AbstractContextManager[Any]]) -> None:
        self.block, self.contexts = block, contexts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            return self.block(*args, **kwargs)


@contextmanager
def replaced(module: nn.Module, name: str, stand_in: Any) -> Iterator[None]:
    """While entered, the module's attribute is something else; its registered submodules stay."""
    module.__dict__[name] = stand_in
    try:
        yield
    finally:
        del module.__dict__[name]
