"""A vector head for backbones that predict no vectors, or none with weights of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class EdgeVectorHead(nn.Module):
    """A vector of each atom: the sum over its edges of a scalar of the edge's features times the edge's direction.

    It turns with the structure, and knows no order of atoms or edges.

    Args:
        channels: number C of features of an edge.
    """

    use_amp = False  # fairchem's heads say so

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scalar = nn.Sequential(
            nn.LayerNorm(channels),  # hosts leave the size of an edge's features to scale factors, or to nothing
            nn.Linear(channels, channels),
            nn.SiLU(),
            nn.Linear(channels, 1, bias=False),
        )

    def forward(self, data: Any, emb: dict[str, Any]) -> dict[str, Tensor]:
        """Predict.

        Args:
            data: a batch of N atoms.
            emb: of E edges the features `edge_embedding` [E, C], the unit vectors to their targets `edge_vec` [E, 3],
                and the targets `edge_idx` [E].

        Returns:
            {"vectors": [N, 3]}.
        """
        features, directions = emb["edge_embedding"].float(), emb["edge_vec"].detach()
        vectors = self.scalar(features) * directions
        return {"vectors": vectors.new_zeros(len(data.pos), 3).index_add(0, emb["edge_idx"], vectors)}
