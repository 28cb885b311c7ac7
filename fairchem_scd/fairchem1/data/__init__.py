"""Datasets the package registers with the host."""

from fairchem_scd.fairchem1.data.emt_slabs import EmtSlabsDataset
from fairchem_scd.fairchem1.data.md_marks import MarkedLmdbDataset
from fairchem_scd.fairchem1.data.numbered import Numbered

__all__ = ["EmtSlabsDataset", "MarkedLmdbDataset", "Numbered"]
