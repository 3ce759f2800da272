"""States of a few positions to logits, and logits to predictions."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.engine import Decoder, LensStatistics, ModelDistribution, distributions
from tunedlens.errors import InputError
from tunedlens.lenses import ResidualLens
from tunedlens.model import FrozenModel
from tunedlens.trajectories.predictions import LensPredictions, Row

LOGITS_AT_A_TIME = 2**25
"""The number of logits in memory, over all rows of all lenses."""


class Reader:
    """Decodes the states of one model in every row with every lens."""

    def __init__(
        self, model: FrozenModel, lenses: Mapping[str, ResidualLens], rows: Sequence[Row]
    ) -> None:
        self.model, self.lenses, self.rows = model, lenses, rows
        self._decoder = Decoder(model.unembedding)
        count = model.identity.vocab_size * len(rows) * len(lenses)
        self.chunk_positions = max(1, LOGITS_AT_A_TIME // count)
        """The number of positions to decode at a time."""

    def logits(
        self, states: Sequence[Float[Tensor, "chunk d_model"]]
    ) -> dict[str, Float[Tensor, "rows chunk vocab"]]:
        """Raw logits of every lens, given the states of every row; valid until the next call."""
        # The state that leaves a block is the one that enters the next.
        layers = [row.layer + (row.site == "resid_post") for row in self.rows]
        hidden = [
            lens.transform_hidden(state, layer)
            for lens in self.lenses.values()
            for state, layer in zip(states, layers, strict=True)
        ]
        logits = self._decoder.model_logits(torch.cat(hidden))
        by_lens = logits.view(len(self.lenses), len(self.rows), len(states[0]), -1)
        return dict(zip(self.lenses, by_lens, strict=True))

    def model_distribution(
        self, logits: Mapping[str, Float[Tensor, "rows chunk vocab"]]
    ) -> ModelDistribution:
        """The model's distribution: the last row of every lens."""
        return ModelDistribution.from_logits(next(iter(logits.values()))[-1])


def ids_to_track(
    logits: Iterable[Float[Tensor, "rows chunk vocab"]], wanted: Iterable[int]
) -> Int[Tensor, "chunk tracked"]:
    """The wanted tokens and the best token of every row at each position, padded with -1."""
    best = torch.cat([one.argmax(-1).cpu() for one in logits])
    lines = [torch.tensor(sorted({*wanted, *column})) for column in best.T.tolist()]
    return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-1)


def read_lens(
    name: str,
    logits: Float[Tensor, "rows chunk vocab"],
    model: ModelDistribution,
    next_ids: Int[Tensor, " chunk"],
    tracked_ids: Int[Tensor, "chunk tracked"],
    k: int,
) -> LensPredictions:
    """The predictions of a lens, from its logits, which are overwritten row by row.

    Args:
        name: the name of the lens, for the message.
        logits: the logits of the lens.
        model: the model's distribution at the same positions.
        next_ids: the true next tokens; -1 where there is none.
        tracked_ids: the tokens to follow at each position, padded with -1.
        k: the number of best tokens to keep.

    Raises:
        InputError: a prediction is not finite.
    """
    followed = torch.cat([next_ids[:, None], tracked_ids], -1)
    ids = followed.clamp(min=0).to(logits.device)
    rows: list[tuple[Tensor, ...]] = []
    for row in logits:
        statistics = LensStatistics(row, model, ids[:, 0])
        values = (
            *statistics.top_k(k),
            statistics.log_sum_exp,
            statistics.entropy_nats,
            statistics.kl_nats.clamp(min=0),  # rounding can make it negative
            statistics.log_prob(ids),
            torch.stack([statistics.rank(column) for column in ids.unbind(-1)], -1),
        )
        rows.append(tuple(value.cpu() for value in values))
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    top_ids, top_log_probs, log_sum_exp, entropy, kl, log_probs, ranks = stacked
    if not kl.isfinite().all():
        raise InputError(
            f"the predictions of the lens {name} on the text are not finite, because its "
            "translators or the states of the model are not"
        )
    log_probs = log_probs.masked_fill(followed < 0, math.nan)
    ranks = ranks.masked_fill(followed < 0, 0)
    return LensPredictions(
        top_ids=top_ids,
        top_log_probs=top_log_probs,
        log_sum_exp=log_sum_exp,
        entropy_nats=entropy,
        kl_nats=kl,
        next_log_probs=log_probs[..., 0],
        next_ranks=ranks[..., 0],
        tracked_log_probs=log_probs[..., 1:],
        tracked_ranks=ranks[..., 1:],
    )


def divergences_by_name(
    logits: Float[Tensor, "rows chunk vocab"], baseline: Float[Tensor, "rows chunk vocab"]
) -> dict[str, Float[Tensor, "rows chunk"]]:
    """The divergences of `metrics.DIVERGENCES`, one row at a time."""
    rows = []
    for ours, theirs in zip(logits, baseline.to(logits.device), strict=True):
        p, q = distributions.log_probs(ours), distributions.log_probs(theirs)
        kl = distributions.kl_divergence(p, q)
        rows.append((kl, distributions.js_divergence(p, q), distributions.total_variation(p, q)))
    kl, js, total_variation = (torch.stack(one).cpu() for one in zip(*rows, strict=True))
    return {"kl_to_baseline_nats": kl, "js_nats": js, "total_variation": total_variation}
