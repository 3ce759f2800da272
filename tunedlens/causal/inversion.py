"""Finds a state that a lens decodes to a wanted distribution."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.engine.distributions import kl_divergence, log_probs
from tunedlens.errors import InputError
from tunedlens.lenses import ResidualLens


class Inversion(NamedTuple):
    """States that a lens decodes to wanted distributions."""

    hidden: Float[Tensor, "*positions d_model"]
    kl_nats: Float[Tensor, "*positions"]
    """KL(wanted ‖ lens), at these states."""
    steps: Int[Tensor, "*positions"]
    """The number of L-BFGS steps."""


def invert(
    lens: ResidualLens,
    logits: Float[Tensor, "*positions vocab"],
    layer: int,
    *,
    site: str = "resid_pre",
    start: Float[Tensor, "*positions d_model"] | None = None,
    penalty: float = 0.0,
    max_steps: int = 500,
) -> Inversion:
    """Find a state of a layer whose lens output has the wanted distribution.

    Minimises KL(wanted ‖ lens(h)) + penalty · ‖h − start‖² / ‖start‖² by L-BFGS. A state of d
    dimensions can express only a small part of all distributions over the vocabulary, and the KL
    shows how close the best state comes. Without a penalty, the result is one of many states with
    this output, and it may differ from all states that occur in the model.

    Args:
        logits: the wanted logits, of which only the softmax is used. For probabilities, pass their
            logarithms; -inf is allowed.
        layer: the layer of the state.
        site: one of `model.SITES`.
        start: the states to start from, such as those of a text; by default the mean row of the
            unembedding under the wanted distribution, with a mean square of 1.
        penalty: in nats, for a distance to the start that equals the norm of the start.
        max_steps: the largest number of L-BFGS steps.

    Raises:
        InputError: the number of tokens or dimensions is not the model's, no token has any
            probability, the lens does not read such a state, or the penalty is negative.
    """
    weight, identity = lens.unembedding.weight, lens.identity
    wanted = _wanted(lens, logits)
    if not penalty >= 0:
        raise InputError(f"penalty must be 0 or more, got {penalty}")
    if start is None:
        rows = wanted.exp().to(weight) @ weight - weight.mean(0)
        start = torch.nn.functional.normalize(rows, dim=-1) * identity.d_model**0.5
    expected = (*logits.shape[:-1], identity.d_model)
    if start.shape != expected:
        raise InputError(f"expected a start of shape {expected}, got {tuple(start.shape)}")
    start = start.detach().to(weight)
    results = [
        _invert_one(lens, one, layer, site, first, penalty, max_steps)
        for one, first in zip(
            wanted.reshape(-1, identity.vocab_size),
            start.reshape(-1, identity.d_model),
            strict=True,
        )
    ]
    shape = logits.shape[:-1]
    return Inversion(
        torch.stack([hidden for hidden, _, _ in results]).view(expected),
        torch.stack([kl for _, kl, _ in results]).view(shape),
        torch.tensor([steps for _, _, steps in results]).view(shape),
    )


def _wanted(
    lens: ResidualLens, logits: Float[Tensor, "*positions vocab"]
) -> Float[Tensor, "*positions vocab"]:
    """The logarithms of the wanted probabilities."""
    identity = lens.identity
    if logits.shape[-1] != identity.vocab_size:
        raise InputError(
            f"expected logits of {identity.vocab_size} tokens, the vocabulary of {identity.name}; "
            f"got {tuple(logits.shape)}"
        )
    wanted = log_probs(logits.detach().to(lens.unembedding.weight.device))
    if wanted.isnan().any():
        raise InputError("expected logits that are finite, or -inf for some of the tokens")
    return wanted


def _invert_one(
    lens: ResidualLens,
    wanted: Float[Tensor, " vocab"],
    layer: int,
    site: str,
    start: Float[Tensor, " d_model"],
    penalty: float,
    max_steps: int,
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""], int]:
    hidden = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [hidden],
        max_iter=max_steps,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    scale = penalty / start.square().sum().clamp(min=torch.finfo(start.dtype).tiny)

    def kl() -> Tensor:
        return kl_divergence(wanted, log_probs(lens(hidden, layer, site)))

    def loss() -> Tensor:
        total = kl() + scale * (hidden - start).square().sum()
        (hidden.grad,) = torch.autograd.grad(total, hidden)
        return total.detach()

    search.step(loss)
    with torch.no_grad():
        return hidden.detach(), kl(), search.state[hidden]["n_iter"]
