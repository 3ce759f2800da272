"""One text through the layers, as plain data."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import TRAJECTORY_METRICS, full_name
from tunedlens.model import HookPoint
from tunedlens.tokenizer import TokenText, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

PartKey = int | slice | tuple[int | slice, int | slice]
"""Layers, or layers and positions, as numbers or slices."""
Tokens = str | int | Sequence[str | int]
"""One token or several, as text or ids."""

TOKENS: dict[str | int, str] = {
    "top1": "the lens's best token",
    "final": "the model's best token",
    "next": "the true next token",
}
"""Tokens that differ from position to position, for the metrics of one token."""


Row = HookPoint
"""A row of a trajectory is a site in a layer of the model."""


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
        return -self.next_log_probs

    def select(self, rows: Sequence[int], positions: Sequence[int]) -> "LensPredictions":
        """Some of the rows and positions."""
        return LensPredictions(
            **{one.name: getattr(self, one.name)[rows][:, positions] for one in fields(self)}
        )

    @staticmethod
    def concatenate(parts: Sequence["LensPredictions"], axis: int) -> "LensPredictions":
        """Join rows (axis 0) or positions (axis 1).

        The tracked tokens are padded to the largest number of them.
        """
        padding = {"tracked_log_probs": math.nan, "tracked_ranks": 0}
        width = max(part.tracked_ranks.shape[-1] for part in parts)
        columns = {one.name: [getattr(p, one.name) for p in parts] for one in fields(parts[0])}
        for name, value in padding.items():
            columns[name] = [
                torch.nn.functional.pad(one, (0, width - one.shape[-1]), value=value)
                for one in columns[name]
            ]
        return LensPredictions(
            **{name: torch.cat(column, axis) for name, column in columns.items()}
        )


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The predictions of lenses on one text, at every layer and position.

    It is plain data, and needs neither the model nor the lenses. `read[layers, positions]` selects
    a part by numbers or slices. Layers keep their numbers in every part, and the last row (the
    model) is always kept. Positions count from the start of the part; `positions` has their
    numbers in the whole text.
    """

    # Bound in `tunedlens/__init__.py`, from `frames`, `storage` and `tunedlens.report`.
    to_dataframe: ClassVar[Callable[..., "DataFrame"]]
    words: ClassVar[Callable[..., "DataFrame"]]
    scores: ClassVar[Callable[..., "DataFrame"]]
    probabilities: ClassVar[Callable[..., "DataFrame"]]
    save: ClassVar[Callable[..., Path]]
    load: ClassVar[Callable[..., "Trajectory"]]
    top_k: ClassVar[Callable[..., object]]
    heatmap: ClassVar[Callable[..., "Figure"]]
    curves: ClassVar[Callable[..., "Figure"]]
    to_html: ClassVar[Callable[..., str]]
    _repr_html_: ClassVar[Callable[..., str]]

    model: str
    """The name of the model."""
    text: str
    """The whole text, even if this is a part."""
    input_ids: Int[Tensor, " positions"]
    next_ids: Int[Tensor, " positions"]
    """The true next tokens; -1 after the last token of the text."""
    positions: list[int]
    rows: list[Row]
    n_layers: int
    predictions: dict[str, LensPredictions]
    """By lens."""
    tracked_ids: Int[Tensor, "positions tracked"]
    """The tokens at each position whose probabilities are known in all rows, padded with -1."""
    track: dict[str, int]
    """The ids of the tokens that were passed as text in `track`."""
    vocabulary: dict[int, TokenText]
    """The text of every token that occurs, by id."""

    def __repr__(self) -> str:
        start = "".join(self.tokens[:12]) + "…" * (len(self.positions) > 12)
        return (
            f"Trajectory({start!r}, lenses: {', '.join(self.predictions)}, "
            f"{len(self.rows)} rows, {len(self.positions)} positions)"
        )

    @cached_property
    def tokens(self) -> list[str]:
        """The input tokens as text."""
        return [self.vocabulary[i].text for i in self.input_ids.tolist()]

    @property
    def row_names(self) -> list[str]:
        """The layers, with their sites if there are several; the last row is `model`."""
        is_plain = len({row.site for row in self.rows[:-1]}) <= 1
        names = [str(row.layer) if is_plain else f"{row.layer} {row.site}" for row in self.rows]
        return [*names[:-1], "model"]

    @property
    def final_ids(self) -> Int[Tensor, " positions"]:
        """The model's most probable next tokens."""
        return next(iter(self.predictions.values())).top_ids[-1, :, 0]

    def all_ids(self) -> set[int]:
        """Every token that occurs."""
        top = [one.top_ids.flatten() for one in self.predictions.values()]
        padded = torch.cat([self.next_ids, self.tracked_ids.flatten()])
        return set(torch.cat([self.input_ids, *top]).tolist()) | set(padded.tolist()) - {-1}

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

    def part_indices(self, key: PartKey) -> tuple[list[int], list[int]]:
        """The indices of the rows and positions of a part, which must not be empty."""
        layers, positions = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        wanted = selected(layers, self.n_layers + 1, "layer")
        rows = [index for index, row in enumerate(self.rows[:-1]) if row.layer in wanted]
        return [*rows, len(self.rows) - 1], selected(positions, len(self.positions), "position")

    def position_index(self, position: int) -> int:
        """The index of a position in this part, from 0. Negative positions count from the end."""
        return selected(position, len(self.positions), "position")[0]

    def lens_name(self, lens: str | None = None) -> str:
        """The name of a lens, checked to exist; by default the first."""
        lens = next(iter(self.predictions)) if lens is None else lens
        if lens not in self.predictions:
            raise InputError(f"lens must be one of {', '.join(self.predictions)}; got {lens!r}")
        return lens

    def token_ids(self, tokens: Tokens) -> list[int]:
        """The ids of one or several tokens, checked to occur."""
        several = as_list(tokens)
        if not several:
            raise InputError("the list of tokens is empty; give at least one token")
        return [self.token_id(token) for token in several]

    def token_id(self, token: str | int) -> int:
        """The id of one token; see `token_ids`."""
        if isinstance(token, str):
            ids = (i for i, one in self.vocabulary.items() if one.text == token)
            found = self.track[token] if token in self.track else next(ids, None)
        else:
            found = as_id(token)
        if found is None or found not in self.vocabulary:
            raise _not_tracked(visible(token) if isinstance(token, str) else f"token {token}")
        return found

    def ids_at(self, token: str | int) -> Int[Tensor, " positions"]:
        """One token per position: the model's best tokens for `final`, else always this token."""
        if token == "final":
            return self.final_ids
        return torch.full_like(self.input_ids, self.token_id(token))

    def values(
        self,
        metric: str = "probability",
        lens: str | None = None,
        *,
        token: str | int | None = None,
    ) -> Float[Tensor, "rows positions"]:
        """One metric of a lens at every row and position.

        Args:
            metric: one of `metrics.TRAJECTORY_METRICS`; short names such as `kl` and `prob` are
                allowed.
            lens: the name of a lens; by default the first.
            token: the token of a probability, log_prob, logit or rank. `top1` is the best token
                of every row and position, `final` the model's best token, and `next` the true
                next token. Any other value is a tracked token, as text or id; its values are NaN
                where it was not tracked. The default is `top1`, and `final` for a rank.

        Raises:
            InputError: there is no such metric, lens or tracked token.
        """
        metric = full_name(metric)
        if not isinstance(metric, str) or metric not in TRAJECTORY_METRICS:
            names = ", ".join(TRAJECTORY_METRICS)
            raise InputError(f"metric must be one of {names}; got {metric!r}")
        one = self.predictions[self.lens_name(lens)]
        if not TRAJECTORY_METRICS[metric].has_token:
            return getattr(one, metric)
        if token is None:
            token = "final" if metric == "rank" else "top1"
        if token == "top1":
            if metric == "rank":
                raise InputError(
                    "the rank of top1 is 1 everywhere; give token='final', 'next' or a token"
                )
            return _metric_of_token(metric, one, one.top_log_probs[..., 0], one.next_ranks)
        if token == "next":
            return _metric_of_token(metric, one, one.next_log_probs, one.next_ranks)
        return self.values_of_ids(metric, lens, self.ids_at(token))

    def values_of_ids(
        self, metric: str, lens: str | None, ids: Int[Tensor, " positions"]
    ) -> Float[Tensor, "rows positions"]:
        """A metric of one tracked token per position; NaN where it was not tracked.

        Raises:
            InputError: none of them was tracked at its position.
        """
        is_it = self.tracked_ids == ids[:, None]
        if not is_it.any():
            known = self.vocabulary.get(int(ids[0]))
            raise _not_tracked(known.shown if known else f"token {int(ids[0])}")
        one = self.predictions[self.lens_name(lens)]
        index = is_it.int().argmax(-1)[None, :, None].expand(len(self.rows), -1, 1)
        ranks = one.tracked_ranks.gather(-1, index)[..., 0]
        log_probs = one.tracked_log_probs.gather(-1, index)[..., 0]
        values = _metric_of_token(metric, one, log_probs, ranks)
        return values.masked_fill(~is_it.any(-1), torch.nan)


def _metric_of_token(
    metric: str,
    lens: LensPredictions,
    log_probs: Float[Tensor, "rows positions"],
    ranks: Int[Tensor, "rows positions"],
) -> Float[Tensor, "rows positions"]:
    if metric == "rank":
        return ranks.float().masked_fill(ranks == 0, torch.nan)
    if metric == "logit":
        return log_probs + lens.log_sum_exp
    return log_probs.exp() if metric == "probability" else log_probs


def _not_tracked(name: str) -> InputError:
    return InputError(f"{name} was not tracked; pass it as `track` to `trajectory`")


def as_list(tokens: Tokens) -> Sequence[str | int]:
    return [tokens] if isinstance(tokens, str) or not isinstance(tokens, Sequence) else tokens


def as_id(token: int) -> int:
    """A token id, which may be an integer of numpy or torch."""
    try:
        return operator.index(token)
    except TypeError:
        raise InputError(f"expected a token as text or id, got {token!r}") from None


def selected(key: int | slice, count: int, what: str) -> list[int]:
    """The indices, of `count` items called `what`, that a number or slice selects."""
    try:
        indices = range(count)[key]
    except (IndexError, TypeError, ValueError):
        raise InputError(
            f"{what} must be between {-count} and {count - 1}, or a slice; got {key}"
        ) from None
    if isinstance(indices, int):
        return [indices]
    if not indices:
        raise InputError(f"there is no {what} in {key}; there are {count}")
    return list(indices)
