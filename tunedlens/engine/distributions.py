"""Pure functions of next-token distributions."""

import math

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

    It is computed in float32, or in float64 if the logits are, and is exactly zero where the
    two distributions agree.

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
    """KL(model || lens) in nats, for a model's distribution that is shared by many lenses."""
    return _expected(model_probs, model_log_probs - lens_log_probs)


def cross_entropy(
    lens_log_probs: Float[Tensor, "*positions vocab"], next_ids: Int[Tensor, "*positions"]
) -> Float[Tensor, "*positions"]:
    """Negative log-probability of the true next token, in nats."""
    return -lens_log_probs.gather(-1, next_ids[..., None])[..., 0]


def entropy(
    log_probs: Float[Tensor, "*positions vocab"],
) -> Float[Tensor, "*positions"]:
    """Entropy of every distribution, in nats, between 0 and ln(vocab)."""
    return -_expected(log_probs.exp(), log_probs)


def js_divergence(
    log_probs: Float[Tensor, "*positions vocab"], other: Float[Tensor, "*positions vocab"]
) -> Float[Tensor, "*positions"]:
    """Jensen-Shannon divergence in nats, at most ln 2: the mean KL to the mixture of both.

    Source:
        Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    mixture = torch.logaddexp(log_probs, other) - math.log(2)
    mean = (
        kl_from_log_probs(log_probs.exp(), log_probs, mixture)
        + kl_from_log_probs(other.exp(), other, mixture)
    ) / 2
    return mean.clamp(min=0)  # rounding can make it negative for equal distributions


def total_variation(
    log_probs: Float[Tensor, "*positions vocab"], other: Float[Tensor, "*positions vocab"]
) -> Float[Tensor, "*positions"]:
    """Half the sum of absolute differences of probability, from 0 to 1."""
    return (log_probs.exp() - other.exp()).abs().sum(-1) / 2


def rank(
    log_probs: Float[Tensor, "*positions vocab"], ids: Int[Tensor, "*positions"]
) -> Int[Tensor, "*positions"]:
    """Rank of one token among all; the most probable token has rank 1.

    Equally probable tokens are ranked in the order of their ids.

    Args:
        log_probs: log-probabilities, or logits, which have the same order.
        ids: the token to rank at every position.
    """
    own = log_probs.gather(-1, ids[..., None])
    # Sums of float32 comparisons use vector instructions and are exact up to 2^24.
    compared = torch.empty_like(log_probs, dtype=torch.float32)
    above = torch.gt(log_probs, own, out=compared).sum(-1).long()
    at_least = torch.ge(log_probs, own, out=compared).sum(-1).long()
    is_tied = at_least > above + 1
    if is_tied.any():
        earlier = torch.arange(log_probs.shape[-1], device=ids.device) < ids[is_tied][:, None]
        above[is_tied] += ((log_probs[is_tied] == own[is_tied]) & earlier).sum(-1)
    return 1 + above


def _expected(
    probs: Float[Tensor, "*positions vocab"], nats: Float[Tensor, "*positions vocab"]
) -> Float[Tensor, "*positions"]:
    """Mean over tokens; a token with probability 0 adds nothing, even if its nats are infinite."""
    return (probs * nats).masked_fill(probs == 0, 0.0).sum(-1)
