"""What a condition is worth, in numbers and in one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import special
from torch import Tensor

SIGNIFICANT = 3.0
"""A gain counts where it is more than so many of its standard errors (see `Gain.margin`) …"""

SMALLEST = 0.001
"""… and not less than this: of a tenth of a percent nobody would have any use, and below are rounding errors."""

WORTHWHILE = 0.05
"""Only where so large a gain can be excluded is it said that there is none."""


@dataclass(frozen=True)
class Gain:
    """1 − (mean of some errors) / (mean of the others), the standard error of that, and over how many structures."""

    value: float
    error: float
    structures: int

    @classmethod
    def of(cls, errors: Tensor, others: Tensor) -> Gain:
        """Of paired errors [B] of B ≥ 2 structures, which need not be alike: a ratio of means.

        To first order in its deviations a ratio r of means has the standard error of the mean of (errors − r others),
        over the mean of the others.

        Raises:
            ValueError: fewer than two structures.
        """
        if len(errors) < 2:
            raise ValueError(f"a standard error needs two structures or more (got {len(errors)})")
        errors, others = errors.double(), others.double()
        bottom = others.mean()
        ratio = errors.mean() / bottom
        spread = (errors - ratio * others).std() / bottom / math.sqrt(len(errors))
        return cls(1 - float(ratio), float(spread), len(errors))

    @property
    def margin(self) -> float:
        """How far chance may move it: `SIGNIFICANT` standard errors; of few structures more, by Student's t."""
        unlikely = special.ndtr(-SIGNIFICANT)
        return self.error * float(-special.stdtrit(self.structures - 1, unlikely))

    @property
    def counts(self) -> bool:
        """Whether it is more than chance and not too small to matter."""
        return self.value > self.margin and self.value >= SMALLEST

    @property
    def excluded(self) -> bool:
        """Whether it is, by all chance, too small to be worth a pass of its own."""
        return not self.counts and self.value + self.margin < WORTHWHILE

    def __str__(self) -> str:
        percent = round(100 * self.value, 1) + 0.0  # no -0.0
        return f"{percent:.1f} ± {100 * self.error:.1f} %"


@dataclass(frozen=True)
class Errors:
    """Errors of the predicted noise by what the noisy pass was told; `zero`: of predicting no noise at all.

    Told `right`, the structure's own embedding; `other`, another structure's; `none`, no embedding.
    """

    right: float
    other: float
    none: float
    zero: float


@dataclass(frozen=True)
class ConditionReport:
    """What the embedding of a structure tells the noisy pass, measured on a data set.

    Attributes:
        structures: how many were judged: those that have noise and an embedding.
        mae: mean absolute errors of the noise's components, Å, over all atoms that have noise. Structures without an
            embedding are in it, as in `denoising_pos_mae`.
        mse: mean square errors over σ², each judged structure counting once.
        gain: 1 − right / other, of `mse`.
        gain_over_none: 1 − right / none, of `mse`. The model is trained without an embedding on a share
            `condition_drop` of the structures alone, so "none" is worse than what plain denoising would reach.
        dimensions: participation ratio of what the judged structures are told.
        spread: `relative_spread` of the same.
        trained_without: the noisy pass was trained without an embedding too. Otherwise "none" says little.
    """

    structures: int
    mae: Errors
    mse: Errors
    gain: Gain
    gain_over_none: Gain
    dimensions: float
    spread: float
    trained_without: bool = True

    @property
    def explained(self) -> Gain:
        """The smaller of both gains, which is what the condition explains.

        Another structure's embedding may mislead a model that relies on it, which makes right / other small though
        nothing is gained over no embedding at all.
        """
        return min(self.gain, self.gain_over_none, key=lambda gain: gain.value)

    def metrics(self) -> dict[str, float]:
        """For the log, by name: see docs/metrics.md."""
        return {
            "denoising_pos_mae": self.mae.right,
            "denoising_pos_mae_other": self.mae.other,
            "denoising_pos_mae_none": self.mae.none,
            "denoising_pos_mae_zero": self.mae.zero,
            "denoising_condition_gain": self.gain.value,
            "denoising_condition_gain_error": self.gain.error,
            "denoising_condition_gain_over_none": self.gain_over_none.value,
            "denoising_condition_gain_over_none_error": self.gain_over_none.error,
            "denoising_condition_dimensions": self.dimensions,
            "denoising_condition_spread": self.spread,
        }

    def sentence(self, *, supervised: bool) -> str:
        """What the condition was worth.

        Args:
            supervised: outputs are trained beside the task. Then its clean pass is needed anyway.
        """
        plain = "condition: [] would have done as much" if supervised else "this was plain denoising at twice the cost"
        if self.gain.counts and self.gain_over_none.counts:
            if self.trained_without:
                return f"The condition explains {self.explained} of the noise error that is left without it."
            return (
                f"The condition explains {self.explained} of the noise error that is left without it, or less: "
                "condition_drop is 0, so no pass was trained without it. Compare with a run of condition: []."
            )
        if self.gain.excluded and self.gain.value > max(self.gain.error, SMALLEST):
            return (
                f"The condition explains little, if anything: the error is {self.gain} less than told another "
                "structure's embedding. condition: [] saves its pass; see docs/pretraining.md."
            )
        if self.gain.excluded:
            found = (
                "The condition carried nothing: another structure's embedding serves as well as the right one "
                f"({self.gain})"
            )
        elif self.gain_over_none.excluded:
            relies = f"relies on the condition (the error is {self.gain} less than told another structure's), but "
            found = (
                f"The model {relies if self.gain.counts else ''}predicts the noise no better with the condition than "
                f"without it ({self.gain_over_none})"
            )
        else:
            over, unsure = ("none", self.gain_over_none) if self.gain.counts else ("another structure's", self.gain)
            return (
                f"Whether the condition explains anything cannot be told from {self.structures} structures: its gain "
                f"over {over} is {unsure}, where chance may make {100 * unsure.margin:.1f} %. Judge more structures; "
                "see docs/metrics.md."
            )
        return f"{found}: {plain}; see docs/pretraining.md."

    def numbers(self) -> str:
        """What the sentence goes by."""
        return (
            f"Noise error of {self.structures} structures (mean square / σ²): {self.mse.right:.4f} told the right "
            f"embedding, {self.mse.other:.4f} told another structure's, {self.mse.none:.4f} told none, "
            f"{self.mse.zero:.4f} for predicting nothing. Gain over another structure's {self.gain}, over none "
            f"{self.gain_over_none}. The embeddings vary in {self.dimensions:.1f} dimensions, by "
            f"{100 * self.spread:.0f} % of their size."
        )


def participation_ratio(samples: Tensor) -> float:
    """Effective number of dimensions in which samples [B, C] vary; zero where they do not.

    (Σλ)² / Σλ² over the eigenvalues λ of their covariance: 1 where all lie on a line, C where they fill all dimensions
    alike.
    """
    centred = samples.double() - samples.double().mean(dim=0)
    covariance = centred.T @ centred
    square = covariance.square().sum()
    return float(covariance.trace().square() / square) if square > 0 else 0.0


def relative_spread(samples: Tensor) -> float:
    """How much samples [B, C] differ: their standard deviation over their root mean square, both over all components.

    Between 0, where all are equal, and 1, where their mean is zero. Near 0 they can tell little apart, in however many
    dimensions they vary.
    """
    samples = samples.double()
    square = samples.square().mean()
    return float((samples.var(dim=0, correction=0).mean() / square).sqrt()) if square > 0 else 0.0
