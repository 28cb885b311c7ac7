"""A vector head for backbones whose edges have features: those that have no head for direct forces."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class EdgeVectorHead(nn.Module):
    """Predicts a vector for each atom: Σ over its edges of MLP(features of the edge) · direction of the edge.

    The vectors rotate with the structure, and do not depend on the order of atoms or edges.

    Args:
        channels: number C of features of an edge.
    """

    use_amp = False  # hosts and passes run a head without autocast where it says so

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scalar = nn.Sequential(
            nn.LayerNorm(channels),  # the size of edge features differs from backbone to backbone
            nn.Linear(channels, channels),
            nn.SiLU(),
            nn.Linear(channels, 1, bias=False),
        )

    def forward(self, data: Any, emb: dict[str, Any]) -> dict[str, Tensor]:
        """Predict.

        Args:
            data: a batch of N atoms.
            emb: what the backbone returned. Of its E edges it has the features `edge_embedding` [E, C], the unit
                vectors towards their target atoms `edge_vec` [E, 3], and the numbers of these atoms `edge_idx` [E].

        Returns:
            {"vectors": [N, 3]}.
        """
        features, directions = emb["edge_embedding"].float(), emb["edge_vec"].detach()
        vectors = self.scalar(features) * directions
        return {"vectors": vectors.new_zeros(len(data.pos), 3).index_add(0, emb["edge_idx"], vectors)}
