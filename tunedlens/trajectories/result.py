"""What lenses say of one text, and what can be asked of it."""

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.engine import distributions
from tunedlens.errors import InputError
from tunedlens.lenses import ResidualLens
from tunedlens.model import FrozenModel
from tunedlens.tokenizer import as_text, shown
from tunedlens.trajectories.predictions import LensPredictions
from tunedlens.trajectories.windows import Row, decode, next_ids, pieces, positions_at_a_time

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FIGURES = {
    "probability": "probability",
    "log_prob": "log probability, nats",
    "logit": "logit",
    "rank": "rank",
    "kl_nats": "KL(model ‖ lens), nats",
    "entropy_nats": "entropy, nats",
    "cross_entropy_nats": "cross-entropy of the true next token, nats",
}
"""What there is to know of a lens at a row and position, and how it is called."""

FIGURES_OF_A_TOKEN = ("probability", "log_prob", "logit", "rank")

DIVERGENCES = {
    "kl_to_other_nats": "KL(this ‖ other), nats",
    "js_nats": "Jensen–Shannon divergence, nats",
    "total_variation": "total variation",
}
"""Between what two lenses, or lenses on two texts, say at the same row and position."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What lenses say of one text, row by row of the model's depth.

    `read[layers, positions]` is a part of it, by numbers or slices. Layers are the model's,
    whatever part is left; its own row, the last one, always stays. Positions are counted in
    the part, and `positions` has them in the text.
    """

    top_k: ClassVar[Callable[..., Any]]
    """See `tunedlens.report.top_k`."""
    heatmap: ClassVar[Callable[..., "Figure"]]
    """See `tunedlens.report.plots.heatmap`."""
    curves: ClassVar[Callable[..., "Figure"]]
    """See `tunedlens.report.plots.curves`."""
    to_html: ClassVar[Callable[..., str]]
    """See `tunedlens.report.explorer`."""

    model: FrozenModel
    """Whose text and tokens these are."""
    lenses: dict[str, ResidualLens]
    """By name."""
    text_ids: Int[Tensor, " text"]
    """Tokens of the whole text."""
    stride: int | None
    """Of the windows of a text that is longer than the context."""
    rows: list[Row]
    positions: list[int]
    """In the text."""
    readings: dict[str, LensPredictions]
    """By name of the lens."""
    tracked_ids: Int[Tensor, "positions tracked"]
    """Tokens that are followed through the rows at each position; -1 where there are fewer."""

    def __repr__(self) -> str:
        start = str(self.model.tokenizer.decode(self.input_ids[:12].tolist()))
        return (
            f"Trajectory({start + '…' * (len(self.positions) > 12)!r}, "
            f"lenses: {', '.join(self.lenses)}, {len(self.rows)} rows, "
            f"{len(self.positions)} positions)"
        )

    @property
    def input_ids(self) -> Int[Tensor, " positions"]:
        """The tokens at the positions that are read."""
        return self.text_ids[self.positions]

    @property
    def next_ids(self) -> Int[Tensor, " positions"]:
        """The tokens that really come next; -1 after the text's last one."""
        return next_ids(self.text_ids)[self.positions]

    @cached_property
    def tokens(self) -> list[str]:
        """The tokens at the positions that are read, decoded one by one."""
        return [self._word(i) for i in self.input_ids.tolist()]

    @property
    def row_names(self) -> list[str]:
        """Layers; with their sites where there are several. The model's own comes last."""
        is_plain = len({row.site for row in self.rows[:-1]}) <= 1
        names = [str(row.layer) if is_plain else f"{row.layer} {row.site}" for row in self.rows]
        return [*names[:-1], "model"]

    def __getitem__(self, key: int | slice | tuple[int | slice, int | slice]) -> "Trajectory":
        layers, positions = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        wanted = _chosen(layers, self.model.identity.n_layers + 1, "layer")
        rows = [index for index, row in enumerate(self.rows[:-1]) if row.layer in wanted]
        rows.append(len(self.rows) - 1)
        places = _chosen(positions, len(self.positions), "position")
        return replace(
            self,
            rows=[self.rows[row] for row in rows],
            positions=[self.positions[place] for place in places],
            readings={name: one.taken(rows, places) for name, one in self.readings.items()},
            tracked_ids=self.tracked_ids[places],
        )

    def reading(self, lens: str | None = None) -> LensPredictions:
        """Of one lens; by default the first.

        Raises:
            InputError: there is no such lens.
        """
        return self.readings[self._name(lens)]

    def place(self, position: int) -> int:
        """Of a position among those that are read, counted from 0; negative from the end.

        Raises:
            InputError: there is no such position.
        """
        return _chosen(position, len(self.positions), "position")[0]

    def shown(self, token: str | int) -> str:
        """A token, as text or id, as a reader should see it; see `tokens.shown`.

        Raises:
            InputError: it is several tokens, or none.
        """
        return shown(self.model.tokenizer, single_id(self.model, token))

    def tracked_places(self, of: str | int) -> Int[Tensor, " positions"]:
        """Where a token stands among those that are tracked at each position; -1: nowhere.

        Args:
            of: a token as text or id; or `final`, the model's best one at each position.

        Raises:
            InputError: it is several tokens, or was not tracked at any position.
        """
        if of == "final":
            wanted = self.reading().top_ids[-1, :, :1]
        else:
            wanted = torch.tensor([[single_id(self.model, of)]])
        is_it = self.tracked_ids == wanted
        if not is_it.any():
            raise InputError(f"{self.shown(of)} was not tracked; give it as `track` to trajectory")
        return torch.where(is_it.any(-1), is_it.int().argmax(-1), -1)

    def figures(
        self,
        metric: str = "probability",
        lens: str | None = None,
        *,
        of: str | int | None = None,
        versus: "Trajectory | str | None" = None,
    ) -> Float[Tensor, "rows positions"]:
        """One figure of a lens at every row and position.

        Args:
            metric: one of `FIGURES`; against another, also of `DIVERGENCES`.
            lens: by name; by default the first.
            of: whose probability, log_prob, logit or rank: `top1` is the best token of every
                row and position, `final` the model's; else a token that was tracked, as text
                or id, NaN where it was not. By default `top1`; of a rank, or against
                another, `final`.
            versus: another trajectory, or another lens of this one, whose figures are
                subtracted; see `divergence`. Of a token both figures are of the same one, but
                for `top1`: another text is read again for that of this one.

        Raises:
            InputError: there is no such metric, lens or tracked token, or the other one
                has other rows or another number of positions.
        """
        if versus is not None and metric in DIVERGENCES:
            return self.divergence(versus, metric, lens)
        if not isinstance(metric, str) or metric not in FIGURES:
            raise InputError(
                f"metric must be one of {', '.join(FIGURES)} (with versus, also of "
                f"{', '.join(DIVERGENCES)}); got {metric!r}"
            )
        if versus is not None:
            other, other_lens = self._other(versus, lens)
            of = whose(metric, of, versus)
            mine = self.figures(metric, lens, of=of)
            if other is self or metric not in FIGURES_OF_A_TOKEN or of == "top1":
                return mine - other.figures(metric, other_lens, of=of)
            best = self.reading().top_ids[-1, :, 0]
            ids = best if of == "final" else torch.full_like(best, single_id(self.model, of))
            return mine - other._figures_of(ids, metric, other_lens)
        reading = self.reading(lens)
        if metric == "cross_entropy_nats":
            return -reading.next_log_prob
        if metric not in FIGURES_OF_A_TOKEN:
            return getattr(reading, metric)
        of = whose(metric, of, versus)
        if of == "top1":
            log_probs = reading.top_log_probs[..., 0]
            ranks = torch.ones_like(log_probs)
        else:
            places = self.tracked_places(of)
            log_probs, found = reading.tracked(places.clamp(min=0))
            is_missing = places < 0
            log_probs = log_probs.masked_fill(is_missing, torch.nan)
            ranks = found.float().masked_fill(is_missing, torch.nan)
        return _of_token(metric, log_probs, reading.log_total, ranks)

    def divergence(
        self, versus: "Trajectory | str", metric: str = "js_nats", lens: str | None = None
    ) -> Float[Tensor, "rows positions"]:
        """How far the distributions are from another's at the same rows and positions.

        The text, or both, are read again, as a trajectory keeps no distributions.

        Args:
            versus: another trajectory, of as many positions, read with the lens of the same
                name (or its first); or another lens of this one.
            metric: one of `DIVERGENCES`: KL(this ‖ other), Jensen-Shannon, total variation.
            lens: by name; by default the first.

        Raises:
            InputError: there is no such metric or lens, or the other one has other rows,
                another number of positions or another vocabulary.
        """
        if not isinstance(metric, str) or metric not in DIVERGENCES:
            raise InputError(f"metric must be one of {', '.join(DIVERGENCES)}; got {metric!r}")
        other, other_lens = self._other(versus, lens)
        between = {
            "kl_to_other_nats": lambda p, q: distributions.kl_from_log_probs(p.exp(), p, q),
            "js_nats": distributions.js_divergence,
            "total_variation": distributions.total_variation,
        }[metric]
        mine, others = self._logits(self._name(lens)), other._logits(other_lens)
        found = []
        for logits, other_logits in zip(mine, others, strict=True):
            p, q = distributions.log_probs(logits), distributions.log_probs(other_logits)
            found.append(between(p, q).cpu())
        return torch.cat(found, 1)

    def to_dataframe(self) -> "DataFrame":
        """Tidy: a line for every lens, site, layer and position."""
        import pandas as pd

        frames = []
        following = [None if i < 0 else self._word(i) for i in self.next_ids.tolist()]
        for lens, reading in self.readings.items():
            for index, row in enumerate(self.rows):
                best = reading.top_ids[index, :, 0].tolist()
                frames.append(
                    pd.DataFrame(
                        {
                            "lens": lens,
                            "site": row.site,
                            "layer": row.layer,
                            "position": self.positions,
                            "token": self.tokens,
                            "next_token": following,
                            "top1": [self._word(i) for i in best],
                            "top1_id": best,
                            "top1_prob": reading.top_log_probs[index, :, 0].exp().tolist(),
                            "top1_logit": reading.top_logits[index, :, 0].tolist(),
                            "entropy_nats": reading.entropy_nats[index].tolist(),
                            "kl_nats": reading.kl_nats[index].tolist(),
                            "cross_entropy_nats": (-reading.next_log_prob[index]).tolist(),
                            "next_rank": pd.array(
                                [rank or None for rank in reading.next_rank[index].tolist()],
                                dtype="Int64",
                            ),
                        }
                    )
                )
        return pd.concat(frames, ignore_index=True)

    def words(self, lens: str | None = None) -> "DataFrame":
        """Wide: the best token at every site and layer (down) and position (across).

        Tokens are as `shown` has them; `to_dataframe` has them plain, and their ids.

        Raises:
            InputError: there is no such lens.
        """
        best = self.reading(lens).top_ids[..., 0].tolist()
        return self._wide([[self.shown(i) for i in line] for line in best])

    def scores(
        self, metric: str = "probability", lens: str | None = None, **options: Any
    ) -> "DataFrame":
        """Wide: one figure at every site and layer (down) and position (across).

        Takes what `figures` takes.
        """
        scores = self._wide(self.figures(metric, lens, **options).tolist())
        return scores.astype("Int64") if metric == "rank" else scores

    def probabilities(
        self,
        tokens: str | int | Sequence[str | int],
        lens: str | None = None,
        position: int | None = None,
    ) -> "DataFrame":
        """Probability of chosen tokens: a line for every site, layer and position.

        `.corr()` of it says which go together. NaN where a token was not tracked.

        Args:
            tokens: as text or ids, tracked.
            lens: by name; by default the first.
            position: only there, among those that are read; lines are then sites and layers.

        Raises:
            InputError: a token was not tracked, is several, or there is no such lens.
        """
        import pandas as pd

        ids = single_ids(self.model, tokens)
        if not ids:
            raise InputError("there is no token to follow; give at least one")
        values = torch.stack([self.figures("probability", lens, of=i) for i in ids], -1)
        names = [self._word(token) for token in ids]
        if position is not None:
            return pd.DataFrame(values[:, self.place(position)], self._rows_index(), names)
        keys = [(*row, position) for row in self.rows for position in self.positions]
        index = pd.MultiIndex.from_tuples(keys, names=["site", "layer", "position"])
        return pd.DataFrame(values.flatten(0, 1), index, names)

    def _word(self, token_id: int) -> str:
        return as_text(self.model.tokenizer, token_id)

    def _name(self, lens: str | None) -> str:
        lens = next(iter(self.readings)) if lens is None else lens
        if lens not in self.readings:
            raise InputError(f"lens must be one of {', '.join(self.readings)}; got {lens!r}")
        return lens

    def _other(self, versus: "Trajectory | str", lens: str | None) -> "tuple[Trajectory, str]":
        """What this is compared with: a trajectory and the name of a lens of it."""
        if isinstance(versus, str):
            return self, self._name(versus)
        mine, others = (len(one.positions) for one in (self, versus))
        if self.rows != versus.rows or mine != others:
            raise InputError(
                f"compared trajectories must have the same rows and as many positions; got "
                f"{len(self.rows)} rows and {mine} positions, and {len(versus.rows)} and {others}; "
                "parts of them, as read[:, 2:], may be compared too"
            )
        size, other_size = (one.model.identity.vocab_size for one in (self, versus))
        if size != other_size:
            raise InputError(
                f"compared models must have one vocabulary; got {size:,} and {other_size:,} tokens"
            )
        name = self._name(lens)
        return versus, name if name in versus.readings else versus._name(None)

    def _figures_of(
        self, ids: Int[Tensor, " positions"], metric: str, lens: str
    ) -> Float[Tensor, "rows positions"]:
        """One figure of these tokens, tracked or not: the text is read again."""
        found, chunks = [], iter(ids)
        for logits in self._logits(lens):
            here = torch.stack(list(itertools.islice(chunks, logits.shape[1]))).to(logits.device)
            log_probs = distributions.log_probs(logits)
            own = log_probs.gather(-1, here[None, :, None].expand(len(logits), -1, 1))[..., 0]
            ranks = 1.0 + (log_probs > own[..., None]).sum(-1)
            found.append(_of_token(metric, own, logits.logsumexp(-1), ranks).cpu())
        return torch.cat(found, 1)

    def _logits(self, lens: str) -> Iterator[Float[Tensor, "rows chunk vocab"]]:
        """What a lens says at these rows and positions, a few positions at a time."""
        found = pieces(self.model, [self.text_ids], self.rows, self.stride)
        states = [torch.cat(parts) for parts in zip(*(p.states for p in found), strict=True)]
        size = positions_at_a_time(self.model, 2 * len(self.rows))
        for part in torch.tensor(self.positions).split(size):
            yield decode(self.lenses[lens], self.rows, [state[part] for state in states])

    def _wide(self, cells: Sequence[Sequence[Any]]) -> "DataFrame":
        import pandas as pd

        columns = pd.MultiIndex.from_arrays(
            [self.positions, [self.shown(i) for i in self.input_ids.tolist()]],
            names=["position", "token"],
        )
        return pd.DataFrame(cells, self._rows_index(), columns)

    def _rows_index(self) -> Any:
        import pandas as pd

        return pd.MultiIndex.from_tuples(self.rows, names=["site", "layer"])


def whose(metric: str, of: str | int | None, versus: Trajectory | str | None = None) -> str | int:
    """The token that a figure is of, if not said.

    Each best one; a rank, of which that is always 1, and a difference, which would be of two
    tokens, the model's best.
    """
    if of is not None:
        return of
    return "top1" if metric != "rank" and versus is None else "final"


def _of_token(
    metric: str,
    log_probs: Float[Tensor, "rows positions"],
    log_total: Float[Tensor, "rows positions"],
    ranks: Float[Tensor, "rows positions"],
) -> Float[Tensor, "rows positions"]:
    """One of `FIGURES_OF_A_TOKEN`."""
    return {
        "probability": log_probs.exp(),
        "log_prob": log_probs,
        "logit": log_probs + log_total,
        "rank": ranks,
    }[metric]


def single_id(model: FrozenModel, token: str | int) -> int:
    """The id of a token that is given as text or id.

    Raises:
        InputError: there is no such id, or the text is several tokens.
    """
    if not isinstance(token, str):
        vocab_size = model.identity.vocab_size
        try:
            token = operator.index(token)
        except TypeError:
            raise InputError(f"expected a token as text or id, got {token!r}") from None
        if not 0 <= token < vocab_size:
            raise InputError(f"a token id must be between 0 and {vocab_size - 1}, got {token}")
        return token
    ids = model.encode(token)[0].tolist()
    if len(ids) != 1:
        parts = ", ".join(repr(as_text(model.tokenizer, i)) for i in ids)
        raise InputError(
            f"{token!r} is {len(ids)} tokens ({parts}); track one of them, or give it with or "
            "without the space before it"
        )
    return ids[0]


def single_ids(model: FrozenModel, tokens: str | int | Sequence[str | int]) -> list[int]:
    """The ids of one token or several.

    Raises:
        InputError: there is no such id, or a text is several tokens.
    """
    several = [tokens] if isinstance(tokens, str) or not isinstance(tokens, Sequence) else tokens
    return [single_id(model, token) for token in several]


def _chosen(key: int | slice, count: int, what: str) -> range:
    """What a number or slice picks of so many.

    Raises:
        InputError: it picks nothing.
    """
    try:
        found = range(count)[key]
    except (IndexError, TypeError, ValueError):
        raise InputError(
            f"{what} must be between {-count} and {count - 1}, or a slice; got {key}"
        ) from None
    if isinstance(found, range):
        if not found:
            raise InputError(f"there is no {what} in {key}; there are {count}")
        return found
    return range(found, found + 1)
