"""The predictions of one lens on one text: plain tensors, no vocabulary axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Row(NamedTuple):
    """A site in a layer of the model."""

    site: str
    """One of `model.sites.SITES`."""
    layer: int
    """The block; `resid_pre` also has layer n, the state that the final norm reads."""


@dataclass(frozen=True, eq=False)
class LensPredictions:
    """The predictions of one lens at every row and position, on the CPU."""

    top_ids: Int[Tensor, "rows positions k"]
    """The most probable tokens, in descending order."""
    top_log_probs: Float[Tensor, "rows positions k"]
    log_sum_exp: Float[Tensor, "rows positions"]
    """log Σ exp(logit). The sum of a log-probability and this is the raw logit."""
    entropy_nats: Float[Tensor, "rows positions"]
    kl_nats: Float[Tensor, "rows positions"]
    """KL(model ‖ lens) at the same position."""
    next_log_probs: Float[Tensor, "rows positions"]
    """The true next token; NaN at the last position of the text."""
    next_ranks: Int[Tensor, "rows positions"]
    """The true next token, from 1; 0 at the last position of the text."""
    tracked_log_probs: Float[Tensor, "rows positions tracked"]
    """The tokens of `Trajectory.tracked_ids`; NaN for padding."""
    tracked_ranks: Int[Tensor, "rows positions tracked"]

    @property
    def top_logits(self) -> Float[Tensor, "rows positions k"]:
        """Raw logits of the most probable tokens; in the last row they are the model's."""
        return self.top_log_probs + self.log_sum_exp[..., None]

    @property
    def cross_entropy_nats(self) -> Float[Tensor, "rows positions"]:
        """Cross-entropy with the true next token; NaN at the last position of the text."""
        return -self.next_log_probs

    def select(self, rows: Sequence[int], positions: Sequence[int]) -> "LensPredictions":
        """Some of the rows and positions."""
        return LensPredictions(
            **{one.name: getattr(self, one.name)[rows][:, positions] for one in fields(self)}
        )

    @staticmethod
    def concatenate(parts: Sequence["LensPredictions"]) -> "LensPredictions":
        """Join chunks of positions; the tracked tokens are padded to the widest chunk."""
        padding = {"tracked_log_probs": math.nan, "tracked_ranks": 0}
        return LensPredictions(
            **{
                name: concatenate([getattr(part, name) for part in parts], padding.get(name))
                for name in (one.name for one in fields(LensPredictions))
            }
        )


def concatenate(parts: Sequence[Tensor], padding: float | None = None) -> Tensor:
    """Join chunks of positions.

    Args:
        parts: chunks with positions as the second axis, or the last but one with padding.
        padding: fills the last axis up to the widest chunk.
    """
    if padding is None:
        return torch.cat(tuple(parts), 1)
    width = max(part.shape[-1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[-1]), value=padding) for part in parts], -2)
