"""The gradient of the KL in the translators."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.lens import AffineLens, Translator
from tunedlens.objective import Keys, LensKL, ModelSide


@torch.no_grad()
def accumulate_gradient(
    lens: AffineLens,
    states: Sequence[Float[Tensor, "tokens d_model"]],
    objective: LensKL,
    *,
    model: ModelSide | None = None,
    keys: Keys | None = None,
    layers: Sequence[int] | None = None,
    share: float = 1.0,
) -> Float[Tensor, " layers"]:
    """Add the gradient of the KL, summed over layers, to that of the lens's translators.

    One layer at a time, so that more layers need no more memory.

    Args:
        lens: the lens whose translators get the gradient.
        states: all states of the residual stream, the last one before the final norm.
        objective: the KL.
        model: the model's side of these tokens, if it is known already.
        keys: of a sample of the vocabulary; by default all of it.
        layers: the layers that take part; all by default.
        share: the fraction of a whole step's tokens that these tokens are.

    Returns:
        Their part of the step's mean KL, in nats; 0 for layers that take no part.
    """
    model = model or objective.model_side(states[-1])
    kl = states[-1].new_zeros(lens.n_layers)
    for layer in range(lens.n_layers) if layers is None else layers:
        hidden, translator = states[layer], lens.translators[layer]
        assert isinstance(translator, Translator)
        nats, gradient = objective.gradient(lens.transform_hidden(hidden, layer), model, keys)
        factor = share / len(nats)
        kl[layer] = nats.sum() * factor
        dtype = objective.dtype
        weight_gradient = (gradient.T.to(dtype) @ hidden.to(dtype)).to(gradient.dtype)
        for parameter, value in (
            (translator.weight, weight_gradient),
            (translator.bias, gradient.sum(0)),
        ):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(value, alpha=factor)
    return kl
