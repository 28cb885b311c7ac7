"""Forms of SCD's condition, which the studies compare with the package's.

Each function changes a `DenoisingHydra` in place, before it is trained; `from_large_noise` changes the trainer's task.
Without a condition all of them compute what the host's plain model computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evidence.forms import blocks, difference, embeddings, training


def together(model: Any) -> None:
    """Those forms that gained about a hundredth each: standardised, started, in the input and the updates.

    The gates of vector features are not among them, since two forms cannot have the same blocks.
    """
    for form in (blocks.into_the_input, blocks.update_layers, blocks.started, embeddings.standardised):
        form(model)


@dataclass(frozen=True)
class Form:
    """A form of SCD's condition.

    Attributes:
        scd: settings of `task.denoising.scd`.
        change: what is done to the model, for forms that the package does not have.
        change_task: what is done to the trainer's task.
    """

    scd: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None
    change_task: Callable[[Any], None] | None = None


LEVERS = {
    "mask token": Form({"null_condition": "mask_token"}),
    "condition never dropped": Form({"condition_drop": 0.0}),
    "condition dropped half of the time": Form({"condition_drop": 0.5}),
    "no gradient through the embedding": Form({"stop_gradient_condition": True}),
    "clean view without noise": Form({"std_reg": 0.0}),
    "clean view with noise of 0.02 Å": Form({"std_reg": 0.02}),
    "standardised": Form(change=embeddings.standardised),
    "standardised by running statistics": Form(change=embeddings.running),
    "standardised, without elements": Form(change=embeddings.without_elements),
    "moments": Form(change=embeddings.moments),
    "modulation not zero at first": Form(change=blocks.started),
    "four vectors, pooled and read by attention": Form(change=embeddings.tokens),
    "pooled by element": Form(change=embeddings.by_element),
    "into the input features too": Form(change=blocks.into_the_input),
    "into the update layers too": Form(change=blocks.update_layers),
    "gates of vector features too": Form(change=blocks.vector_gates),
    "shift, scale and gate of the condition alone": Form(change=blocks.condition_alone),
    "five times the learning rate": Form(change=blocks.faster),
    "dropped by atom": Form({"condition_drop": 0.0}, embeddings.dropped_by_atom),
    "contrastive term": Form(change=training.contrastive),
    "σ from large to small": Form(change_task=training.from_large_noise),
    "mean of the noise kept": Form(change_task=training.with_mean),
    "difference, the embedding beside it": Form(change=difference.told_differences_and_embedding),
    "difference of embeddings": Form(change=difference.told_difference_of_embeddings),
    "difference of embeddings, the embedding beside it": Form(
        change=difference.told_difference_of_embeddings_and_embedding
    ),
    "five of these together": Form(change=together, change_task=training.from_large_noise),
}
"""Forms that differ from the package's in one thing; `mask token` is the authors'."""
FORMS = {
    "plain": Form({"condition": []}),
    "difference": Form(change=difference.told_differences),
    "embedding": Form(),
    **LEVERS,
}
"""By name: no condition, `difference.told_differences`, the package's, and others."""
