"""A random sample of the vocabulary, from which one training step estimates its gradient.

Token v is in the sample with a known probability π_v, so Σ exp(z_v) / π_v over the sample is an
unbiased estimate of the sum over the vocabulary; the same holds with W_v as a factor. A softmax of
the logits minus log π_v over the sample estimates E_q[W] with a bias that decreases as 1 / size.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.devices import has_float64, send

OverVocab = Float[Tensor, " vocab"]
_FLOOR = 0.02
"""Uniform fraction of the proposal, so that no token has π_v = 0."""
_NEVER = 1e30
"""Stands for log π_v at a place of the sample that holds no token: exp(z_v) / π_v is then 0."""
_DEVIATIONS = 4
"""Standard deviations by which the number of drawn tokens may exceed the expected one on a GPU."""


class VocabSample(NamedTuple):
    """The sampled tokens and log π_v of each.

    On a GPU the number of places is fixed, because reading the number of tokens that were drawn
    would wait for the device. The places that are left over hold any token and `_NEVER`.
    """

    ids: Int[Tensor, " size"]
    log_inclusion: Float[Tensor, " size"]


def inclusion_probabilities(usage: OverVocab, size: int) -> OverVocab:
    """π_v of every token: proportional to the square root of its usage, at most 1, sum `size`.

    If the usage is the sum of p_v² over the tokens of a step, these probabilities minimise the
    variance of an estimate of p. A token that is very probable at one position gets a higher
    probability than a token that is slightly probable at many positions.
    """
    usage = usage if has_float64(usage.device) else usage.cpu()
    roots, tiny = usage.double().sqrt(), torch.finfo(torch.float64).tiny
    if size >= len(usage):
        return torch.ones_like(roots)
    proposal = (1 - _FLOOR) * (roots / roots.sum().clamp_min(tiny)) + _FLOOR / len(usage)
    # The sum of whole numbers does not depend on their order, which differs between GPUs.
    proposal = (proposal * 2.0**52).round()
    # If the m largest are 1, the others share the rest of the size. The right m is the smallest one
    # for which none of these exceeds 1. Clamping then sets the m largest to 1.
    descending = proposal.sort(descending=True).values
    left = size - torch.arange(len(usage), device=usage.device)
    rest = descending.flip(0).cumsum(0).flip(0)
    m = (left * descending > rest).sum(0, keepdim=True)
    return (proposal * (left / rest).gather(0, m)).clamp(max=1)


def draw_sample(usage: OverVocab, size: int, seed: int, step: int) -> VocabSample:
    """Draw the sample of one step as a function of usage, seed and step alone.

    Each token is compared with its own uniform random number, so tokens are drawn independently and
    their number varies around `size`. Another number of processes changes the last digits of the
    usage, and this almost never changes the sample.

    Args:
        usage: squares of the model's probabilities, summed over the tokens of the step.
        size: the expected number of tokens.
    """
    probabilities = inclusion_probabilities(usage, size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    uniform = torch.rand(len(usage), dtype=torch.float64, generator=generator)
    # A token whose probability is NaN is drawn, which makes the KL NaN.
    is_drawn = ~(send(uniform, probabilities.device) >= probabilities)
    if is_drawn.device.type == "cpu":
        ids = is_drawn.nonzero()[:, 0]
        log_inclusion = probabilities[ids].log()
    else:
        places = min(size + round(_DEVIATIONS * size**0.5), len(usage))
        ids = is_drawn.byte().argsort(descending=True, stable=True)[:places]
        log_inclusion = probabilities[ids].log().masked_fill(~is_drawn[ids], _NEVER)
    return VocabSample(ids.to(usage.device), log_inclusion.to(usage))
