"""One text through the layers as a picture: layers up, positions across."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.plots.style import new_figure
from tunedlens.tokens import shown
from tunedlens.trajectory import Reading, Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {
    "probability": "probability",
    "log_prob": "log probability, nats",
    "logit": "logit",
    "rank": "rank",
    "kl_nats": "KL(model ‖ lens), nats",
    "entropy_nats": "entropy, nats",
    "cross_entropy_nats": "cross-entropy of the true next token, nats",
}
_OF_TOKEN = ("probability", "log_prob", "logit", "rank")
_MOST_POSITIONS = 60
_POSITIONS_ON_A_PAGE = 24
_LONGEST_WORD = 9


def heatmap(
    trajectory: Trajectory,
    metric: str = "probability",
    lens: str | None = None,
    *,
    of: str | int = "top1",
    positions: slice = slice(None),
    layer_stride: int = 1,
) -> "Figure":
    """The best token of every layer and position, coloured by a figure.

    The model itself is on top, the embeddings below. Cells whose best token is already the
    model's are outlined; true next tokens stand above, in bold where the model is right.
    Position 0 keeps out of the limits of the colours.

    Args:
        trajectory: of one text.
        metric: probability, log_prob, logit, rank, kl_nats, entropy_nats or
            cross_entropy_nats.
        lens: by name; by default the first.
        of: whose probability or rank: `top1` is each cell's own best token, `final` the model's;
            else a token that was tracked. A rank is by default that of `final`.
        positions: which are drawn; at most 60 at a time.
        layer_stride: draw every so many layers, the last one always.

    Raises:
        InputError: there is no such metric, lens or tracked token, or nothing to draw.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    if metric not in _LABELS:
        raise InputError(f"metric must be one of {', '.join(_LABELS)}; got {metric!r}")
    if metric == "rank" and of == "top1":
        of = "final"
    reading = trajectory.reading(lens)
    values = _values(trajectory, reading, metric, of)
    columns = list(range(len(trajectory.tokens)))[positions]
    if not columns:
        raise InputError(f"there is no position in {positions}; the text has {len(values[0])}")
    if len(columns) > _MOST_POSITIONS:
        raise InputError(
            f"{len(columns)} positions are too many to read in one figure; give `positions` a "
            f"slice of at most {_MOST_POSITIONS}"
        )
    last = len(reading.rows) - 1
    rows = sorted({*range(0, last + 1, max(1, layer_stride)), last})
    drawn = values[rows][:, columns]
    counted = drawn[:, [c != 0 or len(columns) == 1 for c in columns]]
    counted = counted[counted.isfinite()]
    low, high = (float(f(counted)) if len(counted) else 1.0 for f in (torch.min, torch.max))
    if metric == "probability":
        low, high = 0.0, 1.0
    norm: Any = LogNorm(1, max(high, 2)) if metric == "rank" else Normalize(low, high)
    name = "cividis_r" if metric in ("rank", "kl_nats", "cross_entropy_nats") else "cividis"
    color_map = colormaps[name].with_extremes(bad="0.85")
    with new_figure(1.6 + 0.62 * len(columns), 1.4 + 0.24 * len(rows)) as figure:
        axes = figure.subplots()
        image = axes.imshow(drawn.numpy(), origin="lower", aspect="auto", norm=norm, cmap=color_map)
        _write_cells(axes, trajectory, reading, image, rows, columns)
        _label_axes(axes, trajectory, reading, rows, columns)
        whose = "" if metric not in _OF_TOKEN else f" of {_whose(trajectory, of)}"
        figure.colorbar(image, ax=axes, label=_LABELS[metric] + whose, pad=0.01, aspect=30)
    return figure


def heatmap_pages(
    trajectory: Trajectory, metric: str = "probability", lens: str | None = None, **options: Any
) -> Iterator["Figure"]:
    """A long text as several heatmaps, each of as many positions as can be read."""
    count = len(trajectory.tokens)
    pages = -(-count // _POSITIONS_ON_A_PAGE)
    size = -(-count // pages)  # alike, so that the last one is not a stump
    for start in range(0, count, size):
        part = slice(start, start + size)
        yield heatmap(trajectory, metric, lens, positions=part, **options)


def _values(
    trajectory: Trajectory, reading: Reading, metric: str, of: str | int
) -> Float[Tensor, "rows positions"]:
    if metric == "cross_entropy_nats":
        return -reading.next_log_prob
    if metric not in _OF_TOKEN:
        return getattr(reading, metric)
    if of == "top1":
        log_probs, ranks = reading.top_log_probs[..., 0], torch.ones_like(reading.kl_nats)
    else:
        if of == "final":
            is_it = trajectory.tracked_ids == reading.top_ids[-1, :, :1]
            if not is_it.any(-1).all():
                raise InputError("the model's best tokens were not tracked; leave `track` out")
            places = is_it.int().argmax(-1)
        else:
            places = trajectory.tracked_places(of)
        log_probs, ranks = reading.tracked(places)
    return {
        "probability": log_probs.exp(),
        "log_prob": log_probs,
        "logit": log_probs + reading.log_total,
        "rank": ranks.float(),
    }[metric]


def _write_cells(
    axes: "Axes",
    trajectory: Trajectory,
    reading: Reading,
    image: Any,
    rows: list[int],
    columns: list[int],
) -> None:
    """The best token in every cell, and a frame where it is the model's already."""
    from matplotlib.patches import Rectangle

    tokenizer = trajectory.model.tokenizer
    data = image.get_array()
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            best = int(reading.top_ids[row, column, 0])
            value = data[y, x]
            red, green, blue, _ = image.cmap(image.norm(value))
            is_light = math.isnan(value) or 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
            word = _plain(shown(tokenizer, best))
            axes.text(
                x,
                y,
                word if len(word) <= _LONGEST_WORD else word[: _LONGEST_WORD - 1] + "…",
                ha="center",
                va="center",
                fontsize=6.5,
                color="black" if is_light else "white",
            )
            if best == int(reading.top_ids[-1, column, 0]) and row != rows[-1]:
                color = "black" if is_light else "white"
                corner = (x - 0.46, y - 0.44)
                axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, lw=0.8, edgecolor=color))
    axes.axhline(len(rows) - 1.5, color="white", linewidth=2)  # the model apart
    axes.axhline(0.5, color="white", linewidth=2)  # and the embeddings


def _label_axes(
    axes: "Axes",
    trajectory: Trajectory,
    reading: Reading,
    rows: list[int],
    columns: list[int],
) -> None:
    tokenizer, ids = trajectory.model.tokenizer, trajectory.input_ids.tolist()
    names = reading.row_names
    axes.set_yticks(range(len(rows)), [names[row] for row in rows], fontsize=7)
    axes.set_ylabel("layer")
    words = [_plain(shown(tokenizer, ids[column])) for column in columns]
    turn: dict[str, Any] = {"rotation": 45, "fontsize": 7}
    axes.set_xticks(range(len(columns)), words, ha="right", rotation_mode="anchor", **turn)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    above = axes.secondary_xaxis("top")
    following = [ids[c + 1] if c + 1 < len(ids) else None for c in columns]
    nexts = ["" if i is None else _plain(shown(tokenizer, i)) for i in following]
    above.set_xticks(range(len(columns)), nexts, ha="left", rotation_mode="anchor", **turn)
    above.tick_params(length=0)
    above.spines[:].set_visible(False)
    for label, column, token in zip(above.get_xticklabels(), columns, following, strict=True):
        if token == int(reading.top_ids[-1, column, 0]):
            label.set_fontweight("bold")


def _whose(trajectory: Trajectory, of: str | int) -> str:
    if of == "top1":
        return "the lens's best token"
    if of == "final":
        return "the model's best token"
    token = of if isinstance(of, str) else shown(trajectory.model.tokenizer, of)
    return _plain(repr(token))


def _plain(text: str) -> str:
    """Without what matplotlib would read as mathematics."""
    return text.replace("\\", r"\\").replace("$", r"\$") if "$" in text else text
