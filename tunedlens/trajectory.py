"""One text through the layers: what every lens says at every layer and position."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens import metrics
from tunedlens.errors import InputError
from tunedlens.frozen import SITES, FrozenModel
from tunedlens.lens import Lens, LogitLens

if TYPE_CHECKING:
    from pandas import DataFrame

_LOGITS_AT_A_TIME = 2**25
"""Over all rows of a lens; the rest of a long text waits."""


class Row(NamedTuple):
    """A place in the model's depth."""

    site: str
    """One of `frozen.SITES`."""
    layer: int
    """Of the block; of `resid_pre` also n, what the final norm sees."""


@dataclass(frozen=True)
class Reading:
    """What one lens says of one text: figures by row and position, on the CPU."""

    rows: list[Row]
    top_ids: Int[Tensor, "rows positions k"]
    """The best tokens, the best one first."""
    top_log_probs: Float[Tensor, "rows positions k"]
    log_total: Float[Tensor, "rows positions"]
    """Logarithm of the total of exp(logit): added to a log probability, it is the raw logit."""
    entropy_nats: Float[Tensor, "rows positions"]
    kl_nats: Float[Tensor, "rows positions"]
    """KL(model ‖ lens), the model at the same position."""
    next_log_prob: Float[Tensor, "rows positions"]
    """Of the true next token; NaN at the last position, which has none."""
    next_rank: Int[Tensor, "rows positions"]
    """Of the true next token, from 1; 0 at the last position."""
    tracked_log_probs: Float[Tensor, "rows positions tracked"]
    """Of `Trajectory.tracked_ids`; NaN where there are fewer."""
    tracked_ranks: Int[Tensor, "rows positions tracked"]

    @property
    def row_names(self) -> list[str]:
        """Layers; with their sites where there are several. The model's own comes last."""
        is_plain = len({row.site for row in self.rows[:-1]}) <= 1
        names = [str(row.layer) if is_plain else f"{row.layer} {row.site}" for row in self.rows]
        return [*names[:-1], "model"]

    def tracked(
        self, places: Int[Tensor, " positions"]
    ) -> tuple[Float[Tensor, "rows positions"], Int[Tensor, "rows positions"]]:
        """Log probabilities and ranks of the token in that place at each position."""
        index = places[None, :, None].expand(len(self.rows), -1, 1)
        log_probs = self.tracked_log_probs.gather(-1, index)
        return log_probs[..., 0], self.tracked_ranks.gather(-1, index)[..., 0]

    @property
    def top_logits(self) -> Float[Tensor, "rows positions k"]:
        """Raw logits of the best tokens; at the last row the model's own."""
        return self.top_log_probs + self.log_total[..., None]


@dataclass(frozen=True)
class Trajectory:
    """What lenses say of one text."""

    tokens: list[str]
    """The text's tokens, decoded one by one."""
    input_ids: Int[Tensor, " positions"]
    readings: dict[str, Reading]
    """By name of the lens."""
    tracked_ids: Int[Tensor, "positions tracked"]
    """Tokens that are followed through the layers at each position; -1 where there are fewer."""
    model: FrozenModel
    """Whose text and tokens these are."""

    def reading(self, lens: str | None = None) -> Reading:
        """Of one lens; by default the first.

        Raises:
            InputError: there is no such lens.
        """
        lens = next(iter(self.readings)) if lens is None else lens
        if lens not in self.readings:
            raise InputError(f"lens must be one of {', '.join(self.readings)}; got {lens!r}")
        return self.readings[lens]

    def tracked_places(self, token: str | int) -> Int[Tensor, " positions"]:
        """Where a token stands among those that are tracked at each position.

        Raises:
            InputError: it was not tracked at every position, or is several tokens.
        """
        is_it = self.tracked_ids == _single_id(self.model, token)
        if not is_it.any(-1).all():
            raise InputError(
                f"{token!r} was not tracked at every position; give it as `track` to trajectory"
            )
        return is_it.int().argmax(-1)

    def heatmap(self, metric: str = "probability", lens: str | None = None, **options: Any) -> Any:
        """A figure of the best token of every layer and position; see `plots.heatmap`."""
        from tunedlens.plots import heatmap

        return heatmap(self, metric, lens, **options)

    def curves(self, tokens: Sequence[str | int], position: int = -1, **options: Any) -> Any:
        """A figure of tokens followed through the layers; see `plots.curves`."""
        from tunedlens.plots import curves

        return curves(self, tokens, position, **options)

    def to_html(self) -> str:
        """A page to explore, with everything in it; see `report.explorer`."""
        from tunedlens.report import explorer

        return explorer(self)

    def to_dataframe(self) -> "DataFrame":
        """Tidy: one row for every lens, site, layer and position."""
        import pandas as pd

        frames = []
        following = [*self.tokens[1:], None]
        for lens, reading in self.readings.items():
            for index, row in enumerate(reading.rows):
                best = reading.top_ids[index, :, 0].tolist()
                frames.append(
                    pd.DataFrame(
                        {
                            "lens": lens,
                            "site": row.site,
                            "layer": row.layer,
                            "position": range(len(self.tokens)),
                            "token": self.tokens,
                            "next_token": following,
                            "top1": [_word(self.model, i) for i in best],
                            "top1_id": best,
                            "top1_prob": reading.top_log_probs[index, :, 0].exp().tolist(),
                            "top1_logit": reading.top_logits[index, :, 0].tolist(),
                            "entropy_nats": reading.entropy_nats[index].tolist(),
                            "kl_nats": reading.kl_nats[index].tolist(),
                            "cross_entropy_nats": (-reading.next_log_prob[index]).tolist(),
                            "next_rank": reading.next_rank[index].tolist(),
                        }
                    )
                )
        return pd.concat(frames, ignore_index=True)

    def top_k(self, position: int = -1, k: int = 5, lens: str | None = None) -> "DataFrame":
        """The best tokens at one position: a row for every site and layer, a column for each place.

        Cells are pairs of a token and its probability.

        Raises:
            InputError: there is no such position or lens, or fewer tokens were kept.
        """
        import pandas as pd

        reading, count = self.reading(lens), len(self.tokens)
        if not -count <= position < count:
            raise InputError(f"position must be between {-count} and {count - 1}, got {position}")
        if not 1 <= k <= reading.top_ids.shape[-1]:
            raise InputError(
                f"k must be between 1 and {reading.top_ids.shape[-1]}, which were kept; got {k}"
            )
        cells = []
        for ids, log_probs in zip(
            reading.top_ids[:, position, :k].tolist(),
            reading.top_log_probs[:, position, :k].exp().tolist(),
            strict=True,
        ):
            words = [_word(self.model, i) for i in ids]
            cells.append(list(zip(words, log_probs, strict=True)))
        index = pd.MultiIndex.from_tuples(reading.rows, names=["site", "layer"])
        return pd.DataFrame(cells, index=index, columns=range(1, k + 1))

    def probabilities(self, tokens: Sequence[str | int], lens: str | None = None) -> "DataFrame":
        """Probability of chosen tokens: a row for every site, layer and position.

        Raises:
            InputError: a token was not tracked, is several, or there is no such lens.
        """
        import pandas as pd

        reading = self.reading(lens)
        columns: dict[str, list[float]] = {}
        for token in tokens:
            log_probs, _ = reading.tracked(self.tracked_places(token))
            name = token if isinstance(token, str) else _word(self.model, token)
            columns[name] = log_probs.exp().flatten().tolist()
        keys = [(*row, position) for row in reading.rows for position in range(len(self.tokens))]
        index = pd.MultiIndex.from_tuples(keys, names=["site", "layer", "position"])
        return pd.DataFrame(columns, index=index)


def trajectory(
    model: FrozenModel,
    lenses: Lens | Mapping[str, Lens] | None,
    text: str | Int[Tensor, " positions"],
    *,
    sites: Sequence[str] = ("resid_pre",),
    k: int = 10,
    track: Sequence[str | int] | None = None,
) -> Trajectory:
    """Read one text with one lens or several.

    Args:
        model: the model.
        lenses: one, several by name, or None for the logit lens.
        text: text, or its token ids.
        sites: where to look, of `frozen.SITES`; `resid_pre` comes with the model's own last
            row. A lens with translators only reads the stream between blocks.
        k: best tokens to keep at each row and position.
        track: tokens to follow at every position, as text or ids; by default, at each position,
            those that are the best one in some row of some lens.

    Raises:
        InputError: the text is empty or beyond the context, a token to track is several, there
            is no such site, or a lens cannot read one.
    """
    named = _named(model, lenses)
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        raise InputError(f"sites must be of {', '.join(SITES)}; got {', '.join(unknown) or 'none'}")
    if not 1 <= k <= model.identity.vocab_size:
        raise InputError(f"k must be between 1 and {model.identity.vocab_size}, got {k}")
    for name, lens in named.items():
        inside = [site for site in sites if site not in ("resid_pre", "resid_post")]
        if inside and not isinstance(lens, LogitLens):
            raise InputError(
                f"the lens {name} has translators for the stream between blocks only, not for "
                f"{', '.join(inside)}; read these with the logit lens alone"
            )
    ids = model.encode(text)[0] if isinstance(text, str) else text.to(model.device)
    wanted = None if track is None else [_single_id(model, token) for token in track]
    rows, states = _states(model, ids, sites)
    following = torch.cat([ids[1:], ids.new_tensor([0])])

    chunks: dict[str, list[Reading]] = {name: [] for name in named}
    tracked: list[list[int]] = []
    size = max(1, _LOGITS_AT_A_TIME // (model.identity.vocab_size * len(rows) * len(named)))
    for part in torch.arange(len(ids)).split(size):
        final = model.unembedding(states[-1][part])
        logits = {name: _logits(lens, rows, states, part) for name, lens in named.items()}
        if wanted is None:
            best = torch.cat([found.argmax(-1) for found in logits.values()])
            ids_here = [sorted(set(column)) for column in best.T.tolist()]
        else:
            ids_here = [wanted for _ in part]
        tracked += ids_here
        for name in named:
            reading = _read(rows, logits[name], final, following[part], ids_here, k)
            chunks[name].append(reading)
    width = max(map(len, tracked))
    readings = {name: _joined(rows, parts, width) for name, parts in chunks.items()}
    for reading in readings.values():
        reading.next_log_prob[:, -1] = math.nan
        reading.next_rank[:, -1] = 0
    padded = torch.tensor([[*line, *[-1] * (width - len(line))] for line in tracked])
    words = [_word(model, i) for i in ids.tolist()]
    return Trajectory(words, ids.cpu(), readings, padded, model)


def _word(model: FrozenModel, token_id: int) -> str:
    """One token as text."""
    return str(model.tokenizer.decode([token_id]))


def _named(model: FrozenModel, lenses: Lens | Mapping[str, Lens] | None) -> dict[str, Lens]:
    if lenses is None:
        return {"logit": LogitLens.from_model(model)}
    if isinstance(lenses, Lens):
        return {type(lenses).__name__.removesuffix("Lens").lower(): lenses}
    if not lenses:
        raise InputError("there is no lens to read with; give one, or None for the logit lens")
    return dict(lenses)


def _single_id(model: FrozenModel, token: str | int) -> int:
    if isinstance(token, int):
        if not 0 <= token < model.identity.vocab_size:
            raise InputError(
                f"a token id must be between 0 and {model.identity.vocab_size - 1}, got {token}"
            )
        return token
    ids = model.encode(token)[0].tolist()
    if len(ids) != 1:
        parts = ", ".join(repr(_word(model, i)) for i in ids)
        raise InputError(
            f"{token!r} is {len(ids)} tokens ({parts}); track one of them, or give it with or "
            "without the space before it"
        )
    return ids[0]


def _states(
    model: FrozenModel, ids: Int[Tensor, " positions"], sites: Sequence[str]
) -> tuple[list[Row], list[Float[Tensor, "positions d_model"]]]:
    """Rows from the first layer to the last, the model's own at the end, and their states."""
    if set(sites) <= {"resid_pre"}:
        states = [state[0] for state in model.residual_stream(ids[None])]
        return [Row("resid_pre", layer) for layer in range(len(states))], states
    found = model.sites(ids[None])
    rows, states = [], []
    for layer in range(model.identity.n_layers):
        for site in SITES:
            if site in sites:
                rows.append(Row(site, layer))
                states.append(found[site][layer][0])
    if rows[-1].site != "resid_post":
        rows.append(Row("resid_pre", model.identity.n_layers))
        states.append(found["resid_post"][-1][0])
    return rows, states


@torch.no_grad()
def _logits(
    lens: Lens, rows: list[Row], states: list[Tensor], part: Int[Tensor, " chunk"]
) -> Float[Tensor, "rows chunk vocab"]:
    # What leaves a block is what enters the next one.
    layers = [row.layer + (row.site == "resid_post") for row in rows]
    return torch.stack([lens(h[part], layer) for h, layer in zip(states, layers, strict=True)])


def _read(
    rows: list[Row],
    logits: Float[Tensor, "rows chunk vocab"],
    final: Float[Tensor, "chunk vocab"],
    following: Int[Tensor, " chunk"],
    tracked: list[list[int]],
    k: int,
) -> Reading:
    """A chunk of positions; one row at a time, so that nothing but logits is held for all."""
    width = max(map(len, tracked))
    ids = torch.tensor([[*line, *[0] * (width - len(line))] for line in tracked])
    is_there = torch.tensor([[i < len(line) for i in range(width)] for line in tracked])
    followed = torch.cat([following[:, None], ids.to(logits.device)], -1)
    model_log_probs = metrics.log_probs(final)
    model_probs = model_log_probs.exp()
    is_above = torch.empty_like(final)  # the same memory for every token and row
    found: dict[str, list[Tensor]] = {name: [] for name in _FIELDS}
    for row in logits:
        log_probs = metrics.log_probs(row)
        top = log_probs.topk(k, -1)
        own = log_probs.gather(-1, followed)
        # As `metrics.rank`, in one comparison: equally probable tokens share the better rank.
        ranks = [torch.gt(log_probs, one[:, None], out=is_above).sum(-1) for one in own.unbind(-1)]
        values = (
            top.indices,
            top.values,
            row.logsumexp(-1),
            metrics.entropy(log_probs),
            metrics.kl_from_log_probs(model_probs, model_log_probs, log_probs),
            own,
            1 + torch.stack(ranks, -1).long(),
        )
        for name, value in zip(_FIELDS, values, strict=True):
            found[name].append(value.cpu())
    stacked = {name: torch.stack(values) for name, values in found.items()}
    log_probs, ranks_of_all = stacked.pop("followed_log_probs"), stacked.pop("followed_ranks")
    return Reading(
        rows=rows,
        **stacked,
        next_log_prob=log_probs[..., 0],
        next_rank=ranks_of_all[..., 0],
        tracked_log_probs=log_probs[..., 1:].masked_fill(~is_there, math.nan),
        tracked_ranks=ranks_of_all[..., 1:].masked_fill(~is_there, 0),
    )


_FIELDS = (
    *("top_ids", "top_log_probs", "log_total", "entropy_nats", "kl_nats"),
    *("followed_log_probs", "followed_ranks"),
)


def _joined(rows: list[Row], parts: list[Reading], width: int) -> Reading:
    """Chunks of positions as one reading."""

    def cat(field: str) -> Tensor:
        return torch.cat([getattr(part, field) for part in parts], 1)

    def widened(field: str, value: float) -> Tensor:
        tensors = [getattr(part, field) for part in parts]
        sizes = [(0, width - tensor.shape[-1]) for tensor in tensors]
        pad = torch.nn.functional.pad
        return torch.cat(
            [pad(t, size, value=value) for t, size in zip(tensors, sizes, strict=True)], 1
        )

    return Reading(
        rows=rows,
        top_ids=cat("top_ids"),
        top_log_probs=cat("top_log_probs"),
        log_total=cat("log_total"),
        entropy_nats=cat("entropy_nats"),
        kl_nats=cat("kl_nats"),
        next_log_prob=cat("next_log_prob"),
        next_rank=cat("next_rank"),
        tracked_log_probs=widened("tracked_log_probs", math.nan),
        tracked_ranks=widened("tracked_ranks", 0),
    )
