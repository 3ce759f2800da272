"""Decodes the states of a few positions to logits, and computes predictions from these."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.engine import Decoder, LensStatistics, ModelDistribution, distributions
from tunedlens.errors import InputError
from tunedlens.model import FrozenModel
from tunedlens.tokenizer import token_text
from tunedlens.trajectories.inputs import Lenses, named_lenses
from tunedlens.trajectories.result import LensPredictions, Trajectory
from tunedlens.trajectories.states import next_ids, rows_of

LOGITS_AT_A_TIME = 2**25
"""The number of logits in memory, over all rows of all lenses."""

Logits = Mapping[str, Float[Tensor, "rows chunk vocab"]]
"""By the names of the lenses."""


class Chunk(NamedTuple):
    """A few positions of a text."""

    predictions: dict[str, LensPredictions]
    tracked_ids: Int[Tensor, "chunk tracked"]


class Reader:
    """Reads the states of one model with lenses; its arguments are those of `trajectory`."""

    def __init__(
        self, model: FrozenModel, lenses: Lenses, sites: str | Sequence[str], k: int
    ) -> None:
        self.model, self.lenses = model, named_lenses(model, lenses)
        self.rows = rows_of(model.identity.n_layers, sites, self.lenses)
        vocab_size = model.identity.vocab_size
        if not 1 <= k <= vocab_size:
            raise InputError(f"k must be between 1 and {vocab_size}, got {k}")
        self._k, self._decoder = k, Decoder(model.unembedding)
        self.chunk_positions = max(
            1, LOGITS_AT_A_TIME // (vocab_size * len(self.rows) * len(self.lenses))
        )
        """The number of positions to decode at a time."""

    def logits(self, states: Sequence[Float[Tensor, "chunk d_model"]]) -> Logits:
        """Raw logits of every lens, given the states of every row; valid until the next call."""
        hidden = [
            lens.transform_hidden(state, row.layer, row.site)
            for lens in self.lenses.values()
            for state, row in zip(states, self.rows, strict=True)
        ]
        logits = self._decoder.model_logits(torch.cat(hidden))
        by_lens = logits.view(len(self.lenses), len(self.rows), len(states[0]), -1)
        return dict(zip(self.lenses, by_lens, strict=True))

    def chunk(
        self,
        logits: Logits,
        following: Int[Tensor, " chunk"],
        tracked_ids: Int[Tensor, "chunk tracked"],
    ) -> Chunk:
        """The predictions of every lens, from its logits, which are overwritten.

        Where there is no next token, `following` is -1. The tracked tokens are padded with -1.

        Raises:
            InputError: a prediction is not finite.
        """
        model = ModelDistribution.from_logits(next(iter(logits.values()))[-1])
        ids = torch.cat([following[:, None], tracked_ids], -1).to(self.model.device)
        predictions = {}
        for name, rows in logits.items():
            parts = [_read_row(row, model, ids, self._k) for row in rows]
            predictions[name] = LensPredictions.concatenate(parts, axis=0)
            if not predictions[name].kl_nats.isfinite().all():
                raise InputError(
                    f"the predictions of the lens {name} on the text are not finite, because its "
                    "translators or the states of the model are not"
                )
        return Chunk(predictions, tracked_ids)

    def trajectory(
        self,
        ids: Int[Tensor, " text"],
        positions: Sequence[int],
        chunks: Sequence[Chunk],
        track: dict[str, int],
    ) -> Trajectory:
        """Join the chunks, and name every token that occurs in them."""
        lines = [line for chunk in chunks for line in chunk.tracked_ids]
        tracked_ids = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-1)
        parts = {name: [chunk.predictions[name] for chunk in chunks] for name in self.lenses}
        predictions = {name: LensPredictions.concatenate(one, 1) for name, one in parts.items()}
        tokenizer = self.model.tokenizer
        trajectory = Trajectory(
            model=self.model.name,
            text=str(tokenizer.decode(ids.tolist())),
            input_ids=ids[positions],
            next_ids=next_ids(ids)[positions],
            positions=list(positions),
            rows=self.rows,
            n_layers=self.model.identity.n_layers,
            predictions=predictions,
            tracked_ids=tracked_ids,
            track=track,
            vocabulary={},
        )
        vocabulary = {i: token_text(tokenizer, i) for i in sorted(trajectory.all_ids())}
        return replace(trajectory, vocabulary=vocabulary)


def _read_row(
    logits: Float[Tensor, "chunk vocab"],
    model: ModelDistribution,
    ids: Int[Tensor, "chunk ids"],
    k: int,
) -> LensPredictions:
    """One row of a lens. The ids are the true next token and those to track, padded with -1."""
    is_missing, ids = ids < 0, ids.clamp(min=0)
    statistics = LensStatistics(logits, model, ids[:, 0])
    top_ids, top_log_probs = statistics.top_k(k)
    log_probs = statistics.log_prob(ids).masked_fill(is_missing, math.nan)
    ranks = statistics.ranks(ids).masked_fill(is_missing, 0)
    values = {
        "top_ids": top_ids,
        "top_log_probs": top_log_probs,
        "log_sum_exp": statistics.log_sum_exp,
        "entropy_nats": statistics.entropy_nats,
        "kl_nats": statistics.kl_nats.clamp(min=0),  # rounding can make it negative
        "next_log_probs": log_probs[:, 0],
        "next_ranks": ranks[:, 0],
        "tracked_log_probs": log_probs[:, 1:],
        "tracked_ranks": ranks[:, 1:],
    }
    return LensPredictions(**{name: value[None].cpu() for name, value in values.items()})


def ids_to_track(logits: Iterable[Logits], wanted: Iterable[int]) -> Int[Tensor, "chunk tracked"]:
    """The wanted tokens and the best token of every row at each position, padded with -1."""
    best = torch.cat([one.argmax(-1).cpu() for by_lens in logits for one in by_lens.values()])
    lines = [torch.tensor(sorted({*wanted, *column})) for column in best.T.tolist()]
    return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-1)


def divergences(
    logits: Float[Tensor, "rows chunk vocab"], baseline: Float[Tensor, "rows chunk vocab"]
) -> Float[Tensor, "divergences rows chunk"]:
    """The divergences in the order of `metrics.DIVERGENCES`, computed one row at a time."""
    rows = []
    for ours, theirs in zip(logits, baseline.to(logits.device), strict=True):
        p, q = distributions.log_probs(ours), distributions.log_probs(theirs)
        kl = distributions.kl_divergence(p, q)
        js, total = distributions.js_divergence(p, q), distributions.total_variation(p, q)
        rows.append(torch.stack([kl, js, total]).cpu())
    return torch.stack(rows, 1)
