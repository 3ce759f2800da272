"""What is measured: pure functions of logits, and sums that stream."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_probs(logits: Float[Tensor, "*positions vocab"]) -> Float[Tensor, "*positions vocab"]:
    """Logarithm of the softmax, in nats, in float32 (float64 where the logits are)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl_divergence(
    model_logits: Float[Tensor, "*positions vocab"],
    lens_logits: Float[Tensor, "*positions vocab"],
) -> Float[Tensor, "*positions"]:
    """KL(model || lens) at every position, in nats.

    Computed in float32, or float64 where the logits are. Zero exactly where the two agree.

    Raises:
        ValueError: the shapes differ; broadcasting would hide it.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 3.
    """
    if model_logits.shape != lens_logits.shape:
        raise ValueError(
            f"model_logits {tuple(model_logits.shape)} and lens_logits "
            f"{tuple(lens_logits.shape)} must have the same shape"
        )
    model_log_probs = log_probs(model_logits)
    return kl_from_log_probs(model_log_probs.exp(), model_log_probs, log_probs(lens_logits))


def kl_from_log_probs(
    model_probs: Float[Tensor, "*positions vocab"],
    model_log_probs: Float[Tensor, "*positions vocab"],
    lens_log_probs: Float[Tensor, "*positions vocab"],
) -> Float[Tensor, "*positions"]:
    """KL(model || lens) in nats; the model's side is made once for many lenses."""
    nats = model_probs * (model_log_probs - lens_log_probs)
    # A token that the model rules out adds nothing, whatever the lens says of it.
    return nats.masked_fill_(model_probs == 0, 0.0).sum(-1)


def cross_entropy(
    lens_log_probs: Float[Tensor, "*positions vocab"], next_ids: Int[Tensor, "*positions"]
) -> Float[Tensor, "*positions"]:
    """Negative log-probability of the token that really comes next, in nats."""
    return -lens_log_probs.gather(-1, next_ids[..., None])[..., 0]


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
    """Exact streaming sums of a figure over blocks: total over total, with its error.

    A block adds a numerator (nats, say) and a denominator (tokens, or bytes). The figure
    is the ratio of the sums, never a mean of means, and the standard error is that of a
    ratio estimator clustered by block, since tokens of one block are not independent.
    The moments of two parts of a corpus add up to those of the whole.

    Source:
        Cochran 1977, Sampling Techniques, section 6.3.
    """

    def __init__(self, *shape: int) -> None:
        self.moments = torch.zeros(*shape, 6, dtype=torch.float64)

    def add(
        self, numerators: Float[Tensor, "*shape blocks"], denominators: Float[Tensor, " blocks"]
    ) -> None:
        """Count further blocks."""
        s = numerators.double()
        n = denominators.double().expand_as(s)
        parts = (s, n, s * s, s * n, n * n, torch.ones_like(s))
        self.moments += torch.stack([part.sum(-1) for part in parts], -1)

    def estimate(self, *index: int) -> Estimate:
        """The figure of one row.

        Raises:
            ValueError: no block was counted.
        """
        s, n, ss, sn, nn, blocks = self.moments[index].tolist()
        if not n:
            raise ValueError("nothing was scored, so there is no figure to report")
        value = s / n
        if blocks < 2:
            return Estimate(value, None)
        spread = max(0.0, ss - 2 * value * sn + value * value * nn)
        return Estimate(value, math.sqrt(spread * blocks / (blocks - 1)) / n)
