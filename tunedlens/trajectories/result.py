"""One text through the layers, as plain data."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import TRAJECTORY_METRICS
from tunedlens.tokenizer import TokenText, visible
from tunedlens.trajectories.predictions import LensPredictions, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

PartKey = int | slice | tuple[int | slice, int | slice]
"""Layers, or layers and positions, as numbers or slices."""

TOKENS: dict[str | int, str] = {
    "top1": "the lens's best token",
    "final": "the model's best token",
    "next": "the true next token",
}
"""Tokens that differ from position to position, for the metrics of one token."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The predictions of lenses on one text, row by row of the model's depth.

    It is plain data: it needs neither the model nor the lenses. `read[layers, positions]`
    selects a part by numbers or slices. Layers are those of the model in every part, and the
    model's row, the last one, always stays. Positions are counted within the part;
    `positions` holds them within the text.
    """

    to_dataframe: ClassVar[Callable[..., "DataFrame"]]
    words: ClassVar[Callable[..., "DataFrame"]]
    scores: ClassVar[Callable[..., "DataFrame"]]
    probabilities: ClassVar[Callable[..., "DataFrame"]]
    """See `tunedlens.trajectories.frames`."""
    top_k: ClassVar[Callable[..., object]]
    """See `tunedlens.report.top_k`."""
    heatmap: ClassVar[Callable[..., "Figure"]]
    curves: ClassVar[Callable[..., "Figure"]]
    """See `tunedlens.report.plots`."""
    to_html: ClassVar[Callable[..., str]]
    """See `tunedlens.report.explorer`."""
    save: ClassVar[Callable[..., None]]
    load: ClassVar[Callable[..., "Trajectory"]]
    """See `tunedlens.trajectories.storage`."""

    model: str
    """The name of the model."""
    text: str
    """The whole text, also in a part."""
    input_ids: Int[Tensor, " positions"]
    next_ids: Int[Tensor, " positions"]
    """The true next tokens; -1 after the last token of the text."""
    positions: list[int]
    rows: list[Row]
    n_layers: int
    predictions: dict[str, LensPredictions]
    """By the names of the lenses."""
    tracked_ids: Int[Tensor, "positions tracked"]
    """Tokens that are followed through the rows at each position, padded with -1."""
    track: dict[str, int]
    """The ids of the tokens that were given as text to be tracked."""
    vocabulary: dict[int, TokenText]
    """Every token that occurs."""

    def __repr__(self) -> str:
        start = "".join(self.tokens[:12]) + "…" * (len(self.positions) > 12)
        return (
            f"Trajectory({start!r}, lenses: {', '.join(self.predictions)}, "
            f"{len(self.rows)} rows, {len(self.positions)} positions)"
        )

    @cached_property
    def tokens(self) -> list[str]:
        """The input tokens as plain text."""
        return [self.vocabulary[i].text for i in self.input_ids.tolist()]

    @property
    def row_names(self) -> list[str]:
        """Layers, with sites if there are several; the last row is the model's."""
        is_plain = len({row.site for row in self.rows[:-1]}) <= 1
        names = [str(row.layer) if is_plain else f"{row.layer} {row.site}" for row in self.rows]
        return [*names[:-1], "model"]

    def __getitem__(self, key: PartKey) -> "Trajectory":
        rows, indices = self.part_indices(key)
        return replace(
            self,
            input_ids=self.input_ids[indices],
            next_ids=self.next_ids[indices],
            positions=[self.positions[index] for index in indices],
            rows=[self.rows[row] for row in rows],
            predictions={name: one.select(rows, indices) for name, one in self.predictions.items()},
            tracked_ids=self.tracked_ids[indices],
        )

    def part_indices(self, key: PartKey) -> tuple[list[int], range]:
        """The indices of the rows and of the positions of a part.

        Raises:
            InputError: the part is empty.
        """
        layers, positions = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        wanted = selected(layers, self.n_layers + 1, "layer")
        rows = [index for index, row in enumerate(self.rows[:-1]) if row.layer in wanted]
        return [*rows, len(self.rows) - 1], selected(positions, len(self.positions), "position")

    def lens_name(self, lens: str | None = None) -> str:
        """The name of a lens; by default the first.

        Raises:
            InputError: there is no such lens.
        """
        lens = next(iter(self.predictions)) if lens is None else lens
        if lens not in self.predictions:
            raise InputError(f"lens must be one of {', '.join(self.predictions)}; got {lens!r}")
        return lens

    def position_index(self, position: int) -> int:
        """The index of a position within this part, from 0; negative ones count from the end.

        Raises:
            InputError: there is no such position.
        """
        return selected(position, len(self.positions), "position")[0]

    def token_id(self, token: str | int) -> int:
        """The id of a token that occurs, given as text or id.

        Raises:
            InputError: the token does not occur, so nothing is known about it.
        """
        if isinstance(token, str):
            ids = (i for i, one in self.vocabulary.items() if one.text == token)
            found = self.track[token] if token in self.track else next(ids, None)
        else:
            try:
                found = operator.index(token)
            except TypeError:
                raise InputError(f"expected a token as text or id, got {token!r}") from None
        if found is None or found not in self.vocabulary:
            name = visible(token) if isinstance(token, str) else f"token {token}"
            raise InputError(f"{name} was not tracked; give it as `track` to trajectory")
        return found

    def token_ids(self, tokens: str | int | Sequence[str | int]) -> list[int]:
        """The ids of one or several tokens that occur.

        Raises:
            InputError: there is none, or one of them does not occur.
        """
        several = (
            [tokens] if isinstance(tokens, str) or not isinstance(tokens, Sequence) else tokens
        )
        if not several:
            raise InputError("there is no token to follow; give at least one")
        return [self.token_id(token) for token in several]

    @property
    def final_ids(self) -> Int[Tensor, " positions"]:
        """The model's most probable tokens."""
        return next(iter(self.predictions.values())).top_ids[-1, :, 0]

    def values(
        self, metric: str = "probability", lens: str | None = None, *, token: str | int = "top1"
    ) -> Float[Tensor, "rows positions"]:
        """One metric of a lens at every row and position.

        Args:
            metric: one of `metrics.TRAJECTORY_METRICS`.
            lens: a name; by default the first.
            token: the token of a probability, log_prob, logit or rank: `top1` is the best
                token of every row and position, `final` the model's best token, `next` the
                true next token; else a tracked token as text or id, with NaN where it was
                not tracked.

        Raises:
            InputError: there is no such metric, lens or tracked token.
        """
        if not isinstance(metric, str) or metric not in TRAJECTORY_METRICS:
            raise InputError(
                f"metric must be one of {', '.join(TRAJECTORY_METRICS)}; got {metric!r}"
            )
        lens = self.lens_name(lens)
        one = self.predictions[lens]
        if not TRAJECTORY_METRICS[metric].has_token:
            return getattr(one, metric)
        if token == "top1":
            if metric == "rank":
                raise InputError(
                    "the rank of top1 is 1 everywhere; give token='final', 'next' or a token"
                )
            return _metric_of_token(metric, one.top_log_probs[..., 0], one.log_sum_exp, None)
        if token == "next":
            ranks = one.next_ranks.float().masked_fill(one.next_ranks == 0, torch.nan)
            return _metric_of_token(metric, one.next_log_probs, one.log_sum_exp, ranks)
        if token == "final":
            return self.values_of_ids(metric, lens, self.final_ids)
        return self.values_of_ids(
            metric, lens, torch.full_like(self.input_ids, self.token_id(token))
        )

    def values_of_ids(
        self, metric: str, lens: str, ids: Int[Tensor, " positions"]
    ) -> Float[Tensor, "rows positions"]:
        """A metric of one tracked token per position; NaN where it was not tracked.

        Raises:
            InputError: none of them was tracked at its position.
        """
        is_it = self.tracked_ids == ids[:, None]
        if not is_it.any():
            name = self.vocabulary[int(ids[0])].shown
            raise InputError(f"{name} was not tracked; give it as `track` to trajectory")
        one = self.predictions[lens]
        index = is_it.int().argmax(-1)[None, :, None].expand(len(self.rows), -1, 1)
        is_missing = ~is_it.any(-1)
        log_probs = one.tracked_log_probs.gather(-1, index)[..., 0]
        ranks = one.tracked_ranks.gather(-1, index)[..., 0].float()
        return _metric_of_token(
            metric,
            log_probs.masked_fill(is_missing, torch.nan),
            one.log_sum_exp,
            ranks.masked_fill(is_missing, torch.nan),
        )


def _metric_of_token(
    metric: str,
    log_probs: Float[Tensor, "rows positions"],
    log_sum_exp: Float[Tensor, "rows positions"],
    ranks: Float[Tensor, "rows positions"] | None,
) -> Float[Tensor, "rows positions"]:
    if metric == "rank":
        assert ranks is not None
        return ranks
    if metric == "probability":
        return log_probs.exp()
    return log_probs + log_sum_exp if metric == "logit" else log_probs


def selected(key: int | slice, count: int, what: str) -> range:
    """The indices that a number or slice selects.

    Args:
        key: a number or slice.
        count: the number of items.
        what: the name of an item, for the message.

    Raises:
        InputError: nothing is selected.
    """
    try:
        indices = range(count)[key]
    except (IndexError, TypeError, ValueError):
        raise InputError(
            f"{what} must be between {-count} and {count - 1}, or a slice; got {key}"
        ) from None
    if isinstance(indices, range):
        if not indices:
            raise InputError(f"there is no {what} in {key}; there are {count}")
        return indices
    return range(indices, indices + 1)
