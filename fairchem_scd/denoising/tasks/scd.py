"""SCD: self-conditioned denoising (Perez, Gómez-Bombarelli, 2026, arXiv 2603.17196)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fairchem_scd.denoising.conditions import ForceEncoding, SelfCondition
from fairchem_scd.denoising.conditions.self_condition import check_null_form
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.corruption import Corruption, corrupt
from fairchem_scd.denoising.plan import VALIDATION, AtomSubset, Objective, Pass
from fairchem_scd.denoising.random import stream
from fairchem_scd.denoising.running_scale import RunningScale
from fairchem_scd.denoising.settings import ScdSettings
from fairchem_scd.denoising.structures import Structures, require
from fairchem_scd.denoising.tasks.base import Backbone, DenoisingTask, TaskModules
from fairchem_scd.errors import ConfigError


class Scd(DenoisingTask):
    """Embed a structure, corrupt it, tell the model the embedding, predict the noise.

    Two passes. The first, over the clean structure, embeds it, and beside other losses predicts the config's outputs
    too. The second, over the corrupted structure, predicts the noise. Settings may choose the atoms to embed and those
    to denoise by their tags; each choice is then a graph of its own, and outputs come from a pass over all atoms.
    """

    name = "scd"
    Settings = ScdSettings
    settings: ScdSettings

    @property
    def labels(self) -> frozenset[str]:
        s = self.settings
        forces = {"forces"} if self.conditions_on_forces else set()
        return frozenset(forces | ({"tags"} if s.subset_tags else set()))

    @property
    def conditions_on_forces(self) -> bool:
        return "forces" in self.settings.condition

    @property
    def subset_settings(self) -> Sequence[str]:
        return tuple(self.settings.subset_tags)

    @property
    def embeds_subset(self) -> bool:
        return self.settings.embed_tags is not None

    @property
    def judges_condition(self) -> bool:
        asked = self.settings.judge_condition
        return self._embeds and (not self.supervised if asked is None else asked)

    def check(self, outputs: Collection[str], trained: Collection[str]) -> None:
        if self.supervised and self.settings.embed_tags is None and self.settings.std_reg:
            raise ConfigError(
                f"{key_of('scd', 'std_reg')}: the clean pass also trains the config's outputs, whose labels belong to "
                "the structure as it is; leave std_reg out"
            )
        if self.settings.recompute_clean_pass and not (self.supervised or self._embeds):
            raise ConfigError(
                f"{key_of('scd', 'recompute_clean_pass')}: there is no clean pass where no outputs are trained and "
                "condition does not name 'self'; leave it out"
            )

    def check_backbone(self, backbone: Backbone, heads: bool) -> None:
        if self._embeds:
            check_null_form(self.settings.null_condition, gradient_forces=backbone.conservative and heads)

    def check_sample(self, sample: Sequence[Structures], origin: str) -> None:
        super().check_sample(sample, origin)
        s = self.settings
        present = sorted({int(tag) for structures in sample for tag in structures.tags}) if s.subset_tags else []
        for key, tags in s.subset_tags.items():
            counts = [int(_tagged(structures, tags).sum()) for structures in sample]
            if max(counts) < 2:
                what = "more than one atom" if max(counts) else "an atom"
                raise ConfigError(
                    f"{key_of('scd', key)}: none of the {len(sample)} structures {origin} has {what} with the "
                    f"tags {sorted(tags)}; their tags: {present}"
                )
        if not any(self.corrupt(structures, seed=0, step=VALIDATION).mask.any() for structures in sample):
            raise ConfigError(
                f"{key_of('scd')}: of the {len(sample)} structures {origin} none has anything to denoise: free "
                f"atoms{f' with the tags {sorted(s.denoise_tags)}' if s.denoise_tags else ''}, two or more of them"
            )

    def modules(self, backbone: Backbone) -> TaskModules:
        s = self.settings
        noise_head, condition = backbone.vector_head(), None
        if self._embeds:
            condition = SelfCondition.build(
                backbone.scalar_channels,
                backbone.num_modulated,
                null_form=s.null_condition,
                gate_bound=s.gate_bound,
            )
        encoding = ForceEncoding(**backbone.encoding_spec) if self.conditions_on_forces else None
        initial = math.sqrt(sum(sigma**2 for sigma in s.sigmas) / len(s.sigmas))
        scale = RunningScale(initial) if self._runs_scale else None
        return TaskModules(noise_head, condition=condition, encoding=encoding, scale=scale)

    def corrupt(self, structures: Structures, *, seed: int, step: int) -> Corruption:
        s = self.settings
        return self._noise(structures, s.denoise_tags, s.sigmas, seed, step, ratio=s.corrupt_ratio)

    def passes(self, structures: Structures, corruption: Corruption, *, seed: int, step: int) -> tuple[Pass, ...]:
        clean, conditioned = [], None
        if self._embeds:
            view = self._clean_view(structures, seed, step)
            # Where all atoms are embedded, the pass that embeds them also predicts the outputs.
            shared = self.supervised and not self.embeds_subset
            if self.supervised and not shared:
                clean.append(Pass(structures.pos))
            clean.append(replace(self.embedding_pass(structures), pos=view, outputs=shared))
            conditioned = self._conditioned(structures, seed, step)
        elif self.supervised:
            clean.append(Pass(structures.pos))
        noisy = Pass(
            structures.displaced(corruption.noise),
            subset=self._denoised(structures, corruption),
            encoding=self._force_encoding(structures, corruption) if self.conditions_on_forces else None,
            conditioned=conditioned,
            outputs=False,
            noise=True,
        )
        return (*map(self._recomputed, clean), noisy)

    def _recomputed(self, clean: Pass) -> Pass:
        # Of a pass whose embedding alone is used and has no gradient, nothing is kept anyway.
        has_gradient = clean.outputs or not clean.detach_embedding
        return replace(clean, recompute=self.settings.recompute_clean_pass and has_gradient)

    def embedding_pass(self, structures: Structures) -> Pass:
        return Pass(
            structures.pos,
            subset=_subset(structures, self._embedded_atoms(structures)),
            outputs=False,
            embed=True,
            detach_embedding=self.settings.stop_gradient_condition,
        )

    def embedded_structures(self, structures: Structures) -> Tensor:
        embedded = torch.zeros(len(structures.natoms), dtype=torch.bool)
        embedded[structures.batch[self._embedded_atoms(structures)]] = True
        return embedded

    def objective(self, progress: float) -> Objective:
        s = self.settings
        scale = None if self._runs_scale else s.std
        return Objective(s.coefficient_of(self.supervised), scale, loss=s.loss, clean=True)

    @property
    def _embeds(self) -> bool:
        return "self" in self.settings.condition

    @property
    def _runs_scale(self) -> bool:
        s = self.settings
        return s.noise_scale == "running" or (s.noise_scale is None and s.schedule is not None)

    def _clean_view(self, structures: Structures, seed: int, step: int) -> Tensor:
        """[N, 3] positions of the clean pass, Å."""
        s = self.settings
        std = s.std_reg_of(self.supervised)
        if std == 0:
            return structures.pos
        view = self._noise(structures, s.embed_tags, (std,), seed, step, purpose="clean view of ")
        return structures.displaced(view.noise)

    def _embedded_atoms(self, structures: Structures) -> Tensor:
        """[N] bool. With `embed_tags`, no single atoms: they would be graphs without edges, which hosts cannot run."""
        chosen = _tagged(structures, self.settings.embed_tags)
        if not self.embeds_subset:
            return chosen
        batch = structures.batch
        counts = torch.zeros_like(structures.natoms).index_add_(0, batch, chosen.to(structures.natoms))
        return chosen & (counts > 1)[batch]

    def _denoised(self, structures: Structures, corruption: Corruption) -> AtomSubset | None:
        """The atoms that the noisy pass has; None: all."""
        if self.settings.denoise_tags is None:
            return None
        chosen = _tagged(structures, self.settings.denoise_tags)
        return _subset(structures, chosen & corruption.corrupted[corruption.batch])

    def _conditioned(self, structures: Structures, seed: int, step: int) -> Tensor:
        """[B] bool: the structures that have an embedding whose condition is not dropped."""
        conditioned = self.embedded_structures(structures)
        if step != VALIDATION:
            drops = [stream(seed, step, f"condition of {name}").random() for name in structures.ids]
            conditioned &= torch.tensor(drops) >= self.settings.condition_drop
        return conditioned

    def _noise(
        self,
        structures: Structures,
        tags: Collection[int] | None,
        sigmas: tuple[float, ...],
        seed: int,
        step: int,
        *,
        ratio: float | None = None,
        purpose: str = "",
    ) -> Corruption:
        """Noise on the atoms with some tags, drawn as if the structure had no others: see `corrupt`."""
        chosen = _tagged(structures, tags)
        movable, batch = self.movable(structures), structures.batch
        counts = torch.zeros_like(structures.natoms).index_add_(0, batch, chosen.to(structures.natoms))
        ids = [purpose + name for name in structures.ids]
        drawn = corrupt(counts, ids, movable[chosen], seed=seed, step=step, sigmas=sigmas, ratio=ratio)
        noise, mask = torch.zeros(len(chosen), 3), torch.zeros_like(chosen)
        noise[chosen], mask[chosen] = drawn.noise, drawn.mask
        return Corruption(noise, mask, drawn.sigma, batch)


def _tagged(structures: Structures, tags: Collection[int] | None) -> Tensor:
    """[N] bool: the atoms with one of the tags; None: all."""
    if tags is None:
        return torch.ones_like(structures.fixed)
    return torch.isin(require(structures.tags, "tags", Scd.name), torch.tensor(sorted(tags)))


def _subset(structures: Structures, chosen: Tensor) -> AtomSubset | None:
    """The chosen [N] atoms as a batch of their own; None: all atoms.

    All atoms also where none is chosen: every rank must run the pass, though then its result is not used.
    """
    return None if chosen.all() or not chosen.any() else AtomSubset.of(structures.natoms, chosen)
