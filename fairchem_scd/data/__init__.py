"""Datasets the package registers with the host."""

from fairchem_scd.data.emt_slabs import EmtSlabsDataset
from fairchem_scd.data.md_marks import MarkedLmdbDataset
from fairchem_scd.data.numbered import Numbered

__all__ = ["EmtSlabsDataset", "MarkedLmdbDataset", "Numbered"]
