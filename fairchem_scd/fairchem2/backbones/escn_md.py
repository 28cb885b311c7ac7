"""eSCN-MD and its mixture of experts, which is UMA's backbone; direct forces or the energy's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from fairchem.core.models.uma.escn_md import (
    Linear_Energy_Head,
    Linear_Force_Head,
    MLP_EFS_Head,
    eSCNMDBackbone,
)
from fairchem.core.models.uma.escn_moe import (
    DatasetSpecificMoEWrapper,
    DatasetSpecificSingleHeadWrapper,
    eSCNMDMoeBackbone,
)
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import Adapter, register_adapter
from fairchem_scd.denoising.coefficients import CoefficientsAdapter
from fairchem_scd.denoising.hooks import StateOfPass


@register_adapter
class ESCNMDAdapter(CoefficientsAdapter, Adapter):
    """Direct and conservative heads; what the blocks do is in `CoefficientsAdapter`."""

    host_class = eSCNMDBackbone
    names = ("escnmd_backbone", "eSCNMDBackbone")

    def vector_head(self) -> nn.Module:
        return Linear_Force_Head(self.backbone)

    @property
    def conservative(self) -> bool:
        regress = self.backbone.regress_config
        return not regress.direct_forces and (regress.forces or regress.stress)

    def scalar_layers(self, head: nn.Module) -> Sequence[nn.Module]:
        if isinstance(head, (DatasetSpecificMoEWrapper, DatasetSpecificSingleHeadWrapper)):
            return self.scalar_layers(head.head)  # with experts, one layer that holds those of all data sets
        if isinstance(head, MLP_EFS_Head):  # MLP_Energy_Head is one, too
            return [head.energy_block[-1]]
        return [head.energy_block] if isinstance(head, Linear_Energy_Head) else []

    @contextmanager
    def skip_energy_readout(self) -> Iterator[None]:
        # One object that the backbone and all its heads share. The backbone prepares for derivatives by it.
        regress = self.backbone.regress_config
        before = regress.forces, regress.stress
        if self.conservative:
            regress.forces = regress.stress = False
        try:
            yield
        finally:
            regress.forces, regress.stress = before

    def periodic(self, pbc: Tensor) -> Tensor:
        """[B, 3] bool: the directions in which the backbone repeats structures whose own `pbc` [B, 3] is given.

        The host's second search for neighbours, the default, goes by the data whatever `always_use_pbc` says.
        """
        always = self.backbone.always_use_pbc and self.backbone.radius_pbc_version != 2
        return torch.ones_like(pbc) if always else pbc


@register_adapter
class ESCNMDMoeAdapter(ESCNMDAdapter):
    """The same with linear layers that mix experts by the structure's composition, charge, spin and data set.

    The mix, and how many edges each structure has, are kept in one object for the whole backbone, which the next pass
    overwrites.
    """

    host_class = eSCNMDMoeBackbone
    names = ("escnmd_moe_backbone", "eSCNMDMoeBackbone")

    def recomputed(self, heads: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, str]]:
        owners = (*(block.edge_wise for block in self.blocks), self.backbone.edge_degree_embedding)
        return [(owner, "forward_chunk") for owner in owners if owner.activation_checkpoint_chunk_size is not None]

    def state_of_pass(self) -> StateOfPass[tuple[Tensor, Tensor]] | None:
        experts = getattr(self.backbone, "global_mole_tensors", None)
        if experts is None:  # num_experts: 0
            return None

        def write(state: tuple[Tensor, Tensor]) -> None:
            experts.expert_mixing_coefficients, experts.mole_sizes = state

        return StateOfPass(lambda: (experts.expert_mixing_coefficients, experts.mole_sizes), write)
