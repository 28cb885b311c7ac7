"""What must hold for a backbone with an adapter, as tests: of this package's own backbones, and of anybody's.

In a test module of your own, with the smallest model that still has every part of yours:

    from fairchem_scd.testing import BackboneClaims

    class TestMine(BackboneClaims):
        backbone = {"model": "my_backbone", "hidden_channels": 8, "otf_graph": True, ...}
        heads = {"energy": {"module": "my_energy_head"}, "forces": {"module": "my_force_head"}}

pytest then runs every claim on it, on strained and rattled metal slabs of about ten atoms with adsorbates. What a
backbone cannot do is not claimed: forces are a condition only where atoms have vector features.
"""

from fairchem_scd.testing.backbone_claims.gradients import GradientClaims
from fairchem_scd.testing.backbone_claims.no_trace import NoTraceClaims
from fairchem_scd.testing.backbone_claims.symmetry import SymmetryClaims
from fairchem_scd.testing.backbone_claims.training import TrainingClaims

__all__ = ["BackboneClaims"]


class BackboneClaims(NoTraceClaims, GradientClaims, SymmetryClaims, TrainingClaims):
    """Claims about one backbone, a test for each. Subclass it under a name that begins with Test.

    Class attributes:
        backbone: the backbone's config, `model` included. Its number of neighbours should not cut any off: which of
            several at equal distances are cut off depends on the batch.
        heads: config of an energy and a force head, by name; together they return `energy` and `forces`.
        symmetry: the relative error that symmetries may have, or three to ten times that of the plain model where it is
            larger.
    """
