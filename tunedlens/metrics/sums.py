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


class Estimate(NamedTuple):
    """A figure for a whole corpus, and how far off it may be."""

    value: float
    standard_error: float | None
    """None where there is a single block, which tells nothing of its own error."""


def perplexity(cross_entropy_nats: Estimate) -> Estimate:
    """`exp` of the mean cross-entropy; its error to first order."""
    value = math.exp(min(cross_entropy_nats.value, 709.0))
    error = cross_entropy_nats.standard_error
    return Estimate(value, None if error is None else value * error)


class RatioSums:
    """Figures that are a total over a total: nats over tokens, say, or bits over bytes.

    Kept are, for the vector of a block's numerators (one column a lens), its denominator
    and 1, the sums over blocks of all products of two of them. They give each column's
    ratio, and any difference of two columns on the same blocks, with the standard error of
    a ratio estimator clustered by block.

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
        """Count further blocks; one with a denominator of 0 is not there."""
        numerators = numerators.double()
        shape = (*numerators.shape[:-2], 1, numerators.shape[-1])
        denominators = denominators.double()[..., None, :].expand(shape)
        vectors = torch.cat([numerators, denominators, (denominators > 0).double()], -2)
        self.moments += vectors @ vectors.mT

    @property
    def denominator(self) -> Float[Tensor, "*shape"]:
        """Total of the denominators."""
        return self.moments[..., -2, -1]

    @property
    def blocks(self) -> Float[Tensor, "*shape"]:
        """How many blocks were counted."""
        return self.moments[..., -1, -1]

    def estimate(self, *index: int) -> Estimate:
        """The figure of one column, given by shape and column.

        Raises:
            ValueError: no block was counted.
        """
        *shape, column = index or (0,)
        return self._estimate(tuple(shape), {column: 1.0})

    def difference(self, *index: int) -> Estimate:
        """The figure of one column less that of another, given by shape and both columns.

        Raises:
            ValueError: no block was counted.
        """
        *shape, column, other = index
        return self._estimate(tuple(shape), {column: 1.0, other: -1.0})

    def estimates(self) -> tuple[Float[Tensor, "*shape columns"], Float[Tensor, "*shape columns"]]:
        """Values and standard errors of all; NaN where nothing was counted."""
        m, n = self.moments, self.denominator[..., None]
        values = m[..., :-2, -1] / n
        squares = m.diagonal(dim1=-2, dim2=-1)[..., :-2]
        crossed = m[..., :-2, -2]
        spread = squares - 2 * values * crossed + values.square() * m[..., -2, -2, None]
        blocks = self.blocks[..., None]
        return values, (spread.clamp(min=0) * blocks / (blocks - 1)).sqrt() / n

    def _estimate(self, index: tuple[int, ...], weights: dict[int, float]) -> Estimate:
        moments = self.moments[index]
        contrast = torch.zeros(len(moments), dtype=torch.float64)
        for column, weight in weights.items():
            contrast[column] = weight
        total, n, blocks = (
            float(contrast @ moments[:, -1]),
            float(moments[-2, -1]),
            float(moments[-1, -1]),
        )
        if not n:
            raise ValueError("nothing was scored, so there is no figure to report")
        value = total / n
        if blocks < 2:
            return Estimate(value, None)
        contrast[-2] = -value
        spread = max(0.0, float(contrast @ moments @ contrast))
        return Estimate(value, math.sqrt(spread * blocks / (blocks - 1)) / n)


GROUPS = 16
"""Parts of a corpus, block by block in turn, that a jackknife leaves out one at a time."""


class GroupSums:
    """Sums that a figure is no ratio of, such as a mean distribution, by group of blocks.

    Args:
        shape: of the sums of one group.
        device: where they are kept.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11.
    """

    def __init__(self, *shape: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(GROUPS, *shape, dtype=torch.float64, device=device)

    def replicates(
        self, figure: Callable[[Tensor], Tensor], used: Sequence[int]
    ) -> Float[Tensor, "replicates ..."]:
        """The figure of all groups, then of all but each one of those that were used."""
        total = self.sums.sum(0)
        without = [figure(total - self.sums[group]).cpu() for group in used if len(used) > 1]
        return torch.stack([figure(total).cpu(), *without])


def jackknife(replicates: Float[Tensor, " replicates"]) -> Estimate:
    """A figure and its standard error, from what `GroupSums.replicates` gives."""
    value, without = float(replicates[0]), replicates[1:]
    if len(without) < 2:
        return Estimate(value, None)
    spread = (without - without.mean()).square().mean() * (len(without) - 1)
    return Estimate(value, float(spread.sqrt()))
