"""Modules that moved stay importable under their former names, and hold the objects of the new ones."""

from __future__ import annotations

import importlib
import sys

import pytest

import fairchem_scd

FORMER = {
    "fairchem_scd.backbones": ("known_backbones", "fairchem_scd.fairchem1.backbones"),
    "fairchem_scd.backbones.edge_vector": ("EdgeVectorHead", "fairchem_scd.denoising.edge_vector"),
    "fairchem_scd.backbones.hooks": ("hooked", "fairchem_scd.denoising.hooks"),
    "fairchem_scd.checkpoint": ("export", "fairchem_scd.fairchem1.checkpoint"),
    "fairchem_scd.cli": ("main", "fairchem_scd.commands"),
    "fairchem_scd.conditions": ("ForceEncoding", "fairchem_scd.denoising.conditions"),
    "fairchem_scd.data": ("EmtSlabsDataset", "fairchem_scd.fairchem1.data"),
    "fairchem_scd.embeddings": ("embed", "fairchem_scd.commands.embed.embeddings"),
    "fairchem_scd.tasks": ("register_task", "fairchem_scd.denoising.tasks"),
    "fairchem_scd.trainers": ("DenoisingMixin", "fairchem_scd.fairchem1.trainer"),
}


@pytest.mark.parametrize("former", FORMER)
def test_a_former_module_warns_and_gives_the_same_objects(former, monkeypatch):
    assert fairchem_scd.DenoisingMixin  # the host's modules are imported in the order that they need
    name, now = FORMER[former]
    monkeypatch.delitem(sys.modules, former, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{former} is now {now}"):
        module = importlib.import_module(former)
    assert getattr(module, name) is getattr(importlib.import_module(now), name)


def test_former_names_of_the_package_stay():
    assert fairchem_scd.Task is fairchem_scd.DenoisingTask
    assert fairchem_scd.DenoisingTrainer.__mro__[1] is fairchem_scd.DenoisingMixin
