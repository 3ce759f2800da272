"""Pure functions of next-token distributions."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

OverVocab = Float[Tensor, "*positions vocab"]
PerPosition = Float[Tensor, "*positions"]


def log_probs(logits: OverVocab) -> OverVocab:
    """Logarithm of the softmax, in nats, in float32 (float64 where the logits are)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def expectation(probs: OverVocab, nats: OverVocab) -> PerPosition:
    """Mean over tokens; a token with probability 0 adds nothing, even if its nats are infinite."""
    return (probs * nats).masked_fill(probs == 0, 0.0).sum(-1)


def kl_divergence(log_probs: OverVocab, other: OverVocab) -> PerPosition:
    """KL to another distribution in nats, exactly zero where the two agree.

    Raises:
        ValueError: the shapes differ; broadcasting would hide it.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 3.
    """
    if log_probs.shape != other.shape:
        raise ValueError(f"shapes must be equal, got {(*log_probs.shape,)} and {(*other.shape,)}")
    return expectation(log_probs.exp(), log_probs - other)


def js_divergence(log_probs: OverVocab, other: OverVocab) -> PerPosition:
    """Jensen-Shannon divergence in nats, at most ln 2: the mean KL to the mixture of both.

    Source:
        Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    mixture = torch.logaddexp(log_probs, other) - math.log(2)
    mean = (kl_divergence(log_probs, mixture) + kl_divergence(other, mixture)) / 2
    return mean.clamp(min=0)  # rounding can make it negative for equal distributions


def total_variation(log_probs: OverVocab, other: OverVocab) -> PerPosition:
    """Half the sum of absolute differences of probability, from 0 to 1."""
    return (log_probs.exp() - other.exp()).abs().sum(-1) / 2


def rank(log_probs: OverVocab, ids: Int[Tensor, "*positions"]) -> Int[Tensor, "*positions"]:
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
    return _ranks(above, at_least, log_probs, ids)


def ranks(
    log_probs: Float[Tensor, "positions vocab"], ids: Int[Tensor, "positions ids"]
) -> Int[Tensor, "positions ids"]:
    """Ranks of several tokens at every position, as `rank` gives them."""
    repeated = log_probs[:, None].expand(*ids.shape, -1)
    if log_probs.device.type != "cpu":
        return rank(repeated, ids)
    # numpy sorts with vector instructions, which takes as long as counting for four tokens.
    ascending, own = torch.from_numpy(np.sort(log_probs.numpy())), log_probs.gather(-1, ids)
    below = torch.searchsorted(ascending, own)
    at_most = torch.searchsorted(ascending, own, right=True)
    vocab_size = log_probs.shape[-1]
    return _ranks(vocab_size - at_most, vocab_size - below, repeated, ids)


def _ranks(
    above: Int[Tensor, "*positions"],
    at_least: Int[Tensor, "*positions"],
    log_probs: OverVocab,
    ids: Int[Tensor, "*positions"],
) -> Int[Tensor, "*positions"]:
    """Ranks from the number of tokens that are more probable, and of those that are not less."""
    is_tied = at_least > above + 1
    if is_tied.any():
        tied, ids = log_probs[is_tied], ids[is_tied][:, None]
        is_earlier = torch.arange(tied.shape[-1], device=ids.device) < ids
        above[is_tied] += ((tied == tied.gather(-1, ids)) & is_earlier).sum(-1)
    return 1 + above
