"""A random sample of the vocabulary, from which one training step estimates its gradient.

Token v is in the sample with a known probability π_v, so Σ exp(z_v) / π_v over the sample is an
unbiased estimate of the sum over the vocabulary, and likewise with W_v beside it. A softmax over
the sample, of logits less log π_v, estimates E_q[W] with a bias that falls as 1 / size.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

OverVocab = Float[Tensor, " vocab"]
_FLOOR = 0.02
"""Uniform fraction of the proposal, so that no token has π_v = 0."""
_FIXED_POINT_STEPS = 32


class VocabSample(NamedTuple):
    """The sampled tokens and log π_v of each."""

    ids: Int[Tensor, " size"]
    log_inclusion: Float[Tensor, " size"]


def inclusion_probabilities(usage: OverVocab, size: int) -> OverVocab:
    """π_v of every token: proportional to the square root of its usage, at most 1, sum `size`.

    If the usage is the sum of p_v² over the tokens of a step, these probabilities minimise the
    variance of an estimate of p. They prefer a token that one position is sure of to a token
    that many positions give a little probability.
    """
    roots, tiny = usage.cpu().double().sqrt(), torch.finfo(torch.float64).tiny
    proposal = (1 - _FLOOR) * (roots / roots.sum().clamp_min(tiny)) + _FLOOR / len(usage)
    probabilities = proposal * size
    for _ in range(_FIXED_POINT_STEPS):
        capped = probabilities >= 1
        if not (probabilities > 1).any():
            break
        rest = proposal.masked_fill(capped, 0)
        scale = (size - capped.sum()) / rest.sum().clamp_min(tiny)
        probabilities = torch.where(capped, 1.0, scale * proposal)
    return probabilities.clamp(max=1)


def draw_sample(usage: OverVocab, size: int, seed: int, step: int) -> VocabSample:
    """Draw the sample of one step as a function of usage, seed and step alone.

    Each token is compared with a uniform number of its own. Tokens are thus independent, their
    number varies around `size`, and a difference in the last digits of the usage, which another
    number of processes makes, hardly ever changes the sample.

    Args:
        usage: squares of the model's probabilities, summed over the tokens of the step.
        size: the expected number of tokens.
    """
    probabilities = inclusion_probabilities(usage, size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    uniform = torch.rand(len(usage), dtype=torch.float64, generator=generator)
    ids = (uniform < probabilities).nonzero()[:, 0]
    return VocabSample(ids.to(usage.device), probabilities[ids].log().to(usage))
