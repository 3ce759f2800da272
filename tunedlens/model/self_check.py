"""Checks that the parts found in a model give the model's own logits."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.model.unembedding import Unembedding

_FAR = 100.0
"""The size of the largest logit at which an undeclared cap would show."""


def check_ids(vocab_size: int, context: int | None) -> Int[Tensor, "2 seq"]:
    """Two sequences of random tokens that differ in the last token only."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, min(16, context or 16)), generator=generator).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % vocab_size
    return ids


def require_causal_states(
    states: list[Float[Tensor, "2 seq d_model"]], n_layers: int, name: str
) -> None:
    """Check the states of `check_ids`: their number, and that later tokens do not change them.

    Raises:
        InputError: they are not those of a causal language model with n blocks.
    """
    if len(states) != n_layers + 1:
        raise InputError(
            f"{name}: expected {n_layers + 1} states of the residual stream, but captured "
            f"{len(states)}; this architecture is not supported"
        )
    for layer, state in enumerate(states):
        if not state.isfinite().all():
            raise InputError(
                f"{name}: the states of layer {layer} are not finite on random tokens; the model's "
                f"weights are damaged, or too large for {str(state.dtype).removeprefix('torch.')}"
            )
        difference = (state[0, :-1] - state[1, :-1]).abs().max()
        if difference > _tolerance(state.dtype) * state.abs().max():
            raise InputError(
                f"{name} is not causal: a token changes the states before it; expected a causal "
                "language model"
            )


def far_factor(unembedding: Unembedding, final: Float[Tensor, "batch seq d_model"]) -> float:
    """A factor for the head's input that makes the logits so large that a cap changes them."""
    raw = F.linear(unembedding.norm(final.float()), unembedding.weight, unembedding.bias)
    largest = 4 * unembedding.cap if unembedding.cap else _FAR
    return max(1.0, largest / float(raw.abs().max()))


def require_same_logits(
    unembedding: Unembedding,
    final: Float[Tensor, "batch seq d_model"],
    expected: Float[Tensor, "batch seq vocab"],
    *,
    name: str,
    factor: float = 1.0,
) -> None:
    """Decode the final state and compare the result with the model's own logits.

    Args:
        expected: the model's own logits.
        name: the name of the model in messages.
        factor: the factor that the input of the head was multiplied by.

    Raises:
        InputError: they differ; the message names the cause if it is a known one.
    """
    if not expected.isfinite().all():
        raise InputError(
            f"{name}: the logits are not finite; the model's weights are damaged, or too large for "
            "their dtype"
        )
    tolerance = _tolerance(final.dtype) * expected.abs().max()
    final, expected = final.float(), expected.float()

    def agrees(logits: Tensor) -> bool:
        return bool((logits - expected).abs().max() <= tolerance)

    def linear(normed: Tensor) -> Tensor:
        bias = unembedding.bias
        return F.linear(normed * factor, unembedding.weight, bias)

    normed = unembedding.norm(final)
    raw = linear(normed)
    decoded = unembedding.capped(raw)
    if agrees(decoded):
        return
    scale = float((raw * expected).sum() / raw.square().sum())
    cap = _cap_between(raw, expected)
    is_square = normed.shape == final.shape
    if is_square and agrees(unembedding.capped(linear(final))):
        reason = "the model applies no norm before its unembedding"
    elif is_square and agrees(unembedding.capped(linear(unembedding.norm(normed)))):
        reason = "the model applies its final norm twice"
    elif agrees(scale * raw):
        reason = (
            f"the model multiplies its logits by {scale:.4g}, which its config does not declare"
        )
    elif unembedding.cap is not None and agrees(raw):
        reason = f"the config declares a cap of {unembedding.cap:g} that the model does not apply"
    elif agrees(cap * torch.tanh(raw / cap)):
        reason = f"the model caps its logits at {cap:.4g}, which its config does not declare"
    else:
        reason = f"the logits differ by up to {float((decoded - expected).abs().max()):.3g}"
    raise InputError(
        f"{name}: the final norm and the unembedding do not give the model's logits "
        f"({reason}); lenses would be wrong, so this architecture is not supported"
    )


def _cap_between(raw: Tensor, expected: Tensor) -> float:
    """The c with `expected = c * tanh(raw / c)` at the largest logit, found by bisection."""
    index = int(raw.abs().argmax())
    largest, capped = (abs(float(logits.flatten()[index])) for logits in (raw, expected))
    low, high = 0.0, 100 * largest or 1.0  # a larger cap changes nothing
    for _ in range(60):
        cap = (low + high) / 2
        low, high = (cap, high) if cap * math.tanh(largest / cap) < capped else (low, cap)
    return high


def _tolerance(dtype: torch.dtype) -> float:
    """The largest relative error that rounding in this dtype can explain."""
    return max(1e-4, 8 * torch.finfo(dtype).eps)
