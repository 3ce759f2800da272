"""Values for a whole corpus with their standard errors, from streaming sums.

Tokens of one block are not independent, so errors are clustered by block. The sums of two parts
of a corpus add up to those of the whole, so results do not depend on how it is cut into batches
or spread over processes.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from tunedlens.distributed import reduce_sums

_LARGEST_EXPONENT = 700.0


class Estimate(NamedTuple):
    """The value of a metric for a whole corpus, and its standard error."""

    value: float
    standard_error: float | None
    """None if there is a single block, which has no spread."""


class Estimates(NamedTuple):
    """Arrays of values and of their standard errors."""

    values: Float[Tensor, "*shape"]
    standard_errors: Float[Tensor, "*shape"]
    """NaN where they are unknown."""

    def at(self, *index: int) -> Estimate:
        """One of the estimates."""
        value, error = (float(part[index]) for part in self)
        return Estimate(value, error if math.isfinite(error) else None)

    def to_list(self) -> list[Estimate]:
        """All of them, in the order of the flattened arrays."""
        return [self.at(*index) for index in product(*map(range, self.values.shape))]


def perplexity(cross_entropy_nats: Estimate) -> Estimate:
    """`exp` of the mean cross-entropy, with its error to first order."""
    value = math.exp(min(cross_entropy_nats.value, _LARGEST_EXPONENT))
    error = cross_entropy_nats.standard_error
    return Estimate(value, None if error is None else value * error)


class RatioSums:
    """Ratios of two totals over blocks, such as nats over tokens or bits over bytes.

    Accumulates Σ_b v_b v_bᵀ over blocks b, where v_b = [numerators, denominator, 1] and the
    numerators have one entry per column. This gives the ratio of every column, and of any linear
    combination of columns, with the standard error of a ratio estimator clustered by block.

    Args:
        shape: shape of an array of independent ratios (such as metrics by layer).
        columns: number of ratios that are compared on the same blocks (such as lenses).

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
        """Add blocks. One with a denominator of 0 does not count as a block."""
        shape = (*numerators.shape[:-2], 1, numerators.shape[-1])
        denominators = denominators.double()[..., None, :].expand(shape)
        is_counted = (denominators > 0).double()
        vectors = torch.cat([numerators.double() * is_counted, denominators, is_counted], -2)
        self.moments += vectors @ vectors.mT

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, in each of them."""
        reduce_sums(accelerator, self.moments)

    @property
    def denominator(self) -> Float[Tensor, "*shape"]:
        """Total of the denominators."""
        return self.moments[..., -2, -1]

    @property
    def blocks(self) -> Float[Tensor, "*shape"]:
        """Number of blocks."""
        return self.moments[..., -1, -1]

    def estimates(self, contrasts: Float[Tensor, "contrasts columns"] | None = None) -> Estimates:
        """Ratios of shape [*shape, contrasts], with their standard errors.

        Args:
            contrasts: weights of the columns; (1, -1) is the first ratio minus the second. By
                default every column by itself.

        Returns:
            NaN where there is no block; an unknown error where there is a single one.
        """
        columns = self.moments.shape[-1] - 2
        contrasts = (torch.eye(columns) if contrasts is None else contrasts).double()
        total = self.denominator[..., None]
        values = (self.moments[..., :-2, -1] @ contrasts.mT) / total
        # The residual of block b is r·v_b = contrast·numerators_b - value · denominator_b.
        weights = contrasts.expand(*values.shape, columns)
        zero = torch.zeros_like(values)[..., None]
        residual = torch.cat([weights, -values[..., None], zero], -1)
        squares = ((residual @ self.moments) * residual).sum(-1).clamp(min=0)
        blocks = self.blocks[..., None]
        return Estimates(values, (squares * blocks / (blocks - 1)).sqrt() / total)


GROUPS = 16
"""Block i belongs to group i mod 16; a jackknife leaves out one group at a time."""


class GroupSums:
    """Sums by group of blocks, for statistics that are not ratios, such as a mean distribution.

    Args:
        shape: shape of the sums of one group.
        device: where they are kept.
    """

    def __init__(self, *shape: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(GROUPS, *shape, dtype=torch.float64, device=device)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, in each of them."""
        reduce_sums(accelerator, self.sums)

    def jackknife(self, statistic: Callable[[Tensor], Tensor]) -> Estimates:
        """A statistic of the sums of all blocks, with its standard error.

        Source:
            Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11.
        """
        used = [group for group in range(GROUPS) if self.sums[group].any()]
        value = statistic(self.sums[used].sum(0)).cpu()
        if len(used) < 2:
            return Estimates(value, torch.full_like(value, math.nan))
        # The sums of the other groups are added up again. Subtracting a group from the total would
        # leave only rounding errors if that group had all of a token's probability.
        others = [[other for other in used if other != group] for group in used]
        without_one = torch.stack([statistic(self.sums[part].sum(0)).cpu() for part in others])
        spread = (without_one - without_one.mean(0)).square().mean(0) * (len(used) - 1)
        return Estimates(value, spread.sqrt())
