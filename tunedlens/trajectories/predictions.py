"""What one lens says of one text, as figures that need no vocabulary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.engine import distributions


@dataclass(frozen=True, eq=False)
class LensPredictions:
    """What one lens says of one text: figures by row and position, on the CPU."""

    top_ids: Int[Tensor, "rows positions k"]
    """The best tokens, the best one first."""
    top_log_probs: Float[Tensor, "rows positions k"]
    log_total: Float[Tensor, "rows positions"]
    """Logarithm of the total of exp(logit): added to a log probability, it is the raw logit."""
    entropy_nats: Float[Tensor, "rows positions"]
    kl_nats: Float[Tensor, "rows positions"]
    """KL(model ‖ lens), the model at the same position."""
    next_log_prob: Float[Tensor, "rows positions"]
    """Of the true next token; NaN at the text's last position, which has none."""
    next_rank: Int[Tensor, "rows positions"]
    """Of the true next token, from 1; 0 at the text's last position."""
    tracked_log_probs: Float[Tensor, "rows positions tracked"]
    """Of `Trajectory.tracked_ids`; NaN where there are fewer."""
    tracked_ranks: Int[Tensor, "rows positions tracked"]

    @property
    def top_logits(self) -> Float[Tensor, "rows positions k"]:
        """Raw logits of the best tokens; at the last row the model's own."""
        return self.top_log_probs + self.log_total[..., None]

    def tracked(
        self, places: Int[Tensor, " positions"]
    ) -> tuple[Float[Tensor, "rows positions"], Int[Tensor, "rows positions"]]:
        """Log probabilities and ranks of the token in that place at each position."""
        index = places[None, :, None].expand(len(self.top_ids), -1, 1)
        log_probs = self.tracked_log_probs.gather(-1, index)
        return log_probs[..., 0], self.tracked_ranks.gather(-1, index)[..., 0]

    def taken(self, rows: Sequence[int], positions: Sequence[int]) -> "LensPredictions":
        """Some of the rows and positions."""
        return LensPredictions(
            **{one.name: getattr(self, one.name)[rows][:, positions] for one in fields(self)}
        )


def read_states(
    logits: Float[Tensor, "rows chunk vocab"],
    final: Float[Tensor, "chunk vocab"],
    next_ids: Int[Tensor, " chunk"],
    tracked_ids: Int[Tensor, "chunk tracked"],
    k: int,
) -> LensPredictions:
    """What there is to keep of the logits of a few positions; one row at a time.

    Args:
        logits: of the lens.
        final: of the model.
        next_ids: the tokens that really come next; -1 where there is none.
        tracked_ids: at each position, the tokens to follow; -1 where there are fewer.
        k: best tokens to keep.
    """
    followed = torch.cat([next_ids[:, None], tracked_ids], -1)
    ids = followed.clamp(min=0).to(logits.device)
    model_log_probs = distributions.log_probs(final)
    model_probs = model_log_probs.exp()
    is_above = torch.empty_like(final)  # the same memory for every token and row
    found: list[tuple[Tensor, ...]] = []
    for row in logits:
        log_probs = distributions.log_probs(row)
        top = log_probs.topk(k, -1)
        own = log_probs.gather(-1, ids)
        # As `metrics.rank`, in one comparison: equally probable tokens share the better rank.
        ranks = [torch.gt(log_probs, one[:, None], out=is_above).sum(-1) for one in own.unbind(-1)]
        values = (
            top.indices,
            top.values,
            row.logsumexp(-1),
            distributions.entropy(log_probs),
            distributions.kl_from_log_probs(model_probs, model_log_probs, log_probs),
            own,
            1 + torch.stack(ranks, -1).long(),
        )
        found.append(tuple(value.cpu() for value in values))
    stacked = [torch.stack(column) for column in zip(*found, strict=True)]
    top_ids, top_log_probs, log_total, entropy, kl, log_probs, ranks_of_all = stacked
    log_probs = log_probs.masked_fill(followed < 0, math.nan)
    ranks_of_all = ranks_of_all.masked_fill(followed < 0, 0)
    return LensPredictions(
        top_ids=top_ids,
        top_log_probs=top_log_probs,
        log_total=log_total,
        entropy_nats=entropy,
        kl_nats=kl,
        next_log_prob=log_probs[..., 0],
        next_rank=ranks_of_all[..., 0],
        tracked_log_probs=log_probs[..., 1:],
        tracked_ranks=ranks_of_all[..., 1:],
    )


def joined(parts: Sequence[LensPredictions]) -> LensPredictions:
    """Chunks of positions as one reading."""
    filler = {"tracked_log_probs": math.nan, "tracked_ranks": 0}
    return LensPredictions(
        **{
            one.name: cat_filled([getattr(part, one.name) for part in parts], filler.get(one.name))
            for one in fields(LensPredictions)
        }
    )


def cat_filled(parts: Sequence[Tensor], filler: float | None = None) -> Tensor:
    """Chunks of positions one after the other; the last dimension filled up to the widest."""
    if filler is None:
        return torch.cat(tuple(parts), 1)
    width = max(part.shape[-1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[-1]), value=filler) for part in parts], -2)
