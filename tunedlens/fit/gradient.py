"""The gradient of the KL in the translators."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.lens import ResidualLens
from tunedlens.objective import LensKL


def accumulate_gradient(
    lens: ResidualLens,
    states: Float[Tensor, "states tokens d_model"],
    objective: LensKL,
    *,
    layers: Sequence[int] | None = None,
    share: float = 1.0,
) -> Float[Tensor, " layers"]:
    """Add the gradient of the KL, summed over layers, to that of the lens's parameters.

    A chunk of tokens at a time from translation to gradient, so that no more memory is
    needed for more tokens, and a few rows of d_model for more layers.

    Args:
        lens: whose parameters.
        states: all states of the residual stream, the last one before the final norm.
        objective: the KL.
        layers: which take part; all by default.
        share: what part of a whole step these tokens are.

    Returns:
        Their part of the step's mean KL, in nats; 0 for layers that take no part.
    """
    layers = range(lens.n_layers) if layers is None else layers
    tokens = states.shape[1]
    kl = states.new_zeros(lens.n_layers)
    for chunk in states.split(objective.chunk, dim=1):
        translated = torch.stack([lens.transform_hidden(chunk[layer], layer) for layer in layers])
        part = objective(translated, chunk[-1]) * (share * chunk.shape[1] / tokens)
        part.sum().backward()
        kl[list(layers)] += part.detach()
    return kl
