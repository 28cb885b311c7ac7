"""What the ranks of a run tell each other."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

Mine = TypeVar("Mine")


def number_of_ranks() -> int:
    """How many ranks the run has; one without a process group."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def gathered(mine: Mine) -> list[Mine]:
    """One object of each rank, in the ranks' order: on one rank, or without a process group, one's own alone.

    A collective call.
    """
    if number_of_ranks() == 1:
        return [mine]
    found: list[Mine] = [mine] * number_of_ranks()
    distributed.all_gather_object(found, mine)
    return found
