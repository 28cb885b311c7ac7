"""What the ranks of a run tell each other."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

Mine = TypeVar("Mine")


def gathered(mine: Mine) -> list[Mine]:
    """One object of each rank, in the ranks' order: on one rank, or without a process group, one's own alone.

    A collective call.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [mine]
    found: list[Mine] = [mine] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    return found
