"""Checks that the parts found in a model give the model's own logits."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.model.unembedding import Unembedding


def require_same_logits(
    unembedding: Unembedding,
    final_state: Float[Tensor, "batch seq d_model"],
    expected: Float[Tensor, "batch seq vocab"],
    *,
    name: str,
    dtype: torch.dtype,
    cap: float | None,
) -> None:
    """Decode the final state and compare the result with the model's own logits.

    Args:
        expected: the model's own logits.
        name: what messages call the model.
        dtype: the model's dtype, which sets the tolerance.
        cap: the soft-cap on logits in the model's config.

    Raises:
        InputError: they differ; the message names the cause if it is a known one.
    """
    expected = expected.float()
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps) * expected.abs().max()

    def agrees(logits: Tensor) -> bool:
        return bool((logits - expected).abs().max() <= tolerance)

    decoded = unembedding(final_state)
    if agrees(decoded):
        return
    scale = float((decoded * expected).sum() / decoded.square().sum())
    if agrees(F.linear(final_state.float(), unembedding.weight, unembedding.bias)):
        reason = "the model applies no norm before its unembedding"
    elif agrees(unembedding(unembedding.norm(final_state.float()))):
        reason = "the model applies its final norm twice"
    elif agrees(scale * decoded):
        reason = f"the model multiplies its logits by {scale:.4g}"
    elif cap and agrees(cap * torch.tanh(decoded / cap)):
        reason = f"the model caps its logits at {cap}"
    else:
        reason = f"the logits differ by up to {float((decoded - expected).abs().max()):.3g}"
    raise InputError(
        f"{name}: final norm and unembedding do not give the model's own logits "
        f"({reason}); a lens on it would be wrong, so this architecture is not supported"
    )
