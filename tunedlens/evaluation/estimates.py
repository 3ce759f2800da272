"""Figures for a whole corpus, from sums that stream, each with its standard error.

Tokens of one block are not independent, so errors are clustered by block. The sums of two
parts of a corpus add up to those of the whole, so nothing depends on how it is cut up.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_LARGEST_EXPONENT = 700.0


class Estimate(NamedTuple):
    """A figure for a whole corpus, and how far off it may be."""

    value: float
    standard_error: float | None
    """None where there is a single block, which tells nothing of its own error."""


def perplexity(cross_entropy_nats: Estimate) -> Estimate:
    """`exp` of the mean cross-entropy, as far as a float goes; its error to first order."""
    value = math.exp(min(cross_entropy_nats.value, _LARGEST_EXPONENT))
    error = cross_entropy_nats.standard_error
    return Estimate(value, None if error is None else value * error)


def to_estimates(values: Float[Tensor, "..."], errors: Float[Tensor, "..."]) -> list[Estimate]:
    """One for each pair of figures; an error that is no number is none."""
    pairs = zip(values.flatten().tolist(), errors.flatten().tolist(), strict=True)
    return [Estimate(value, error if math.isfinite(error) else None) for value, error in pairs]


class RatioSums:
    """Figures that are a total over a total: nats over tokens, say, or bits over bytes.

    Kept are, for the vector of a block's numerators (one column a lens), its denominator
    and 1, the sums over blocks of all products of two of them. They give each column's
    ratio, and that of any difference of columns on the same blocks, with the standard error
    of a ratio estimator clustered by block.

    Args:
        shape: of figures with their own sums (metrics, layers).
        columns: of figures that are to be compared on the same blocks (lenses).

    Source:
        Cochran 1977, Sampling Techniques, section 6.3.
    """

    def __init__(self, *shape: int, columns: int = 1) -> None:
        self.moments = torch.zeros(*shape, columns + 2, columns + 2, dtype=torch.float64)

    def add(
        self,
        numerators: Float[Tensor, "*shape columns blocks"],
        denominators: Float[Tensor, "*#shape blocks"],
    ) -> None:
        """Count further blocks; one with a denominator of 0 is left out."""
        shape = (*numerators.shape[:-2], 1, numerators.shape[-1])
        denominators = denominators.double()[..., None, :].expand(shape)
        there = (denominators > 0).double()
        vectors = torch.cat([numerators.double() * there, denominators, there], -2)
        self.moments += vectors @ vectors.mT

    @property
    def denominator(self) -> Float[Tensor, "*shape"]:
        """Total of the denominators."""
        return self.moments[..., -2, -1]

    @property
    def blocks(self) -> Float[Tensor, "*shape"]:
        """How many blocks were counted."""
        return self.moments[..., -1, -1]

    def estimates(
        self, contrasts: Float[Tensor, "figures columns"] | None = None
    ) -> tuple[Float[Tensor, "*shape figures"], Float[Tensor, "*shape figures"]]:
        """Values and standard errors.

        Args:
            contrasts: rows are weights of the columns: (1, -1) is the first less the second.
                By default every column by itself.

        Returns:
            NaN where nothing was counted; no error where a single block was.
        """
        columns = self.moments.shape[-1] - 2
        if contrasts is None:
            contrasts = torch.eye(columns)
        n = self.denominator[..., None]
        values = (self.moments[..., :-2, -1] @ contrasts.double().mT) / n
        # Of a block's numerator and denominator: what is left of the one when the ratio times
        # the other is taken away.
        shape = (*values.shape, columns)
        residual = torch.cat(
            [
                contrasts.double().expand(shape),
                -values[..., None],
                torch.zeros_like(values)[..., None],
            ],
            -1,
        )
        spread = ((residual @ self.moments) * residual).sum(-1).clamp(min=0)
        blocks = self.blocks[..., None]
        return values, (spread * blocks / (blocks - 1)).sqrt() / n


GROUPS = 16
"""Parts of a corpus, block by block in turn, that a jackknife leaves out one at a time."""


class GroupSums:
    """Sums that a figure is no ratio of, such as a mean distribution, by group of blocks.

    Args:
        shape: of the sums of one group.
        device: where they are kept.
    """

    def __init__(self, *shape: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(GROUPS, *shape, dtype=torch.float64, device=device)

    def replicates(
        self, figure: Callable[[Tensor], Tensor], used: Sequence[int]
    ) -> Float[Tensor, "replicates ..."]:
        """The figure of all groups, then of all but each one of those that were used."""
        used = list(used)
        # Added up anew: taking a group from the total would leave nothing but rounding where
        # all of a token's probability is in that group.
        parts = [used, *([other for other in used if other != group] for group in used)]
        return torch.stack([figure(self.sums[part].sum(0)).cpu() for part in parts if part])


def jackknife(
    replicates: Float[Tensor, "replicates ..."],
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Figures and their standard errors, from what `GroupSums.replicates` gives.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11.
    """
    value, without = replicates[0], replicates[1:]
    if len(without) < 2:
        return value, torch.full_like(value, math.nan)
    spread = (without - without.mean(0)).square().mean(0) * (len(without) - 1)
    return value, spread.sqrt()
