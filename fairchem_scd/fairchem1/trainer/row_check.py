"""What makes a row one that a run on fairchem 1.x cannot train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fairchem_scd.denoising.adapter import Adapter
from fairchem_scd.fairchem1.data.guarded import check_row


def row_check(
    split: str, needed: Mapping[str, str], adapter: Adapter, optim: Mapping[str, Any]
) -> Callable[[Any], None]:
    """A function that raises ConfigError or DataError for a row that a run cannot train or be judged on.

    Args:
        split: "train" or "val".
        needed: for each label that is used, what asks for it.
        adapter: of the model's backbone.
        optim: the config's `optim` block, for the size of the batches.
    """
    backbone, batch_size = adapter.backbone, optim.get("batch_size", 1)
    if split == "val":
        batch_size = optim.get("eval_batch_size", batch_size)
    alone = "with optim.batch_size: 1 nothing else does" if batch_size == 1 else ""
    if not adapter.runs_lone_structures:
        alone = f"{adapter.names[0]} runs no structure without any"
    return partial(
        check_row,
        split=split,
        needed=needed,
        max_num_elements=adapter.max_num_elements,
        elements_key=adapter.elements_key,
        use_pbc=getattr(backbone, "use_pbc", True),
        cutoff=getattr(backbone, "cutoff", None),
        alone=alone,
    )
