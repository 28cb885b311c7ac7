"""What the user's config calls the denoising block, for messages: each host has a key of its own for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_BLOCK: ContextVar[str] = ContextVar("denoising block", default="task.denoising")


def key_of(*path: str) -> str:
    """The whole key of a setting, as the user wrote it; without arguments that of the block.

    `key_of("scd", "std")` is "task.denoising.scd.std", unless `block_called` says otherwise.
    """
    return ".".join((_BLOCK.get(), *path))


@contextmanager
def block_called(name: str) -> Iterator[None]:
    """While entered, messages call the block by this key."""
    token = _BLOCK.set(name)
    try:
        yield
    finally:
        _BLOCK.reset(token)
