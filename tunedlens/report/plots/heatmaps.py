"""One text through the layers as a picture: layers up, positions across."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.report.plots.style import drawable, new_figure, scale
from tunedlens.trajectories import DIVERGENCES, FIGURES, FIGURES_OF_A_TOKEN, Trajectory, whose

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POSITIONS = 60
_WIDEST_WORD = 6.0
"""In sizes of its letters."""
_CELL = 0.62
"""Width in inches."""

_READABLE = 0.179
"""From this luminance on, black letters have more contrast than white ones."""

_KNOWN: dict[str | int, str] = {
    "top1": "the lens's best token",
    "final": "the model's best token",
}


def heatmap(
    trajectory: Trajectory,
    metric: str = "probability",
    lens: str | Sequence[str] | None = None,
    *,
    of: str | int | None = None,
    versus: Trajectory | str | None = None,
    width: float | None = None,
) -> "Figure":
    """The best token of every row and position, coloured by a figure.

    The model itself is on top, the embeddings below. Cells whose best token is already the
    model's are outlined; true next tokens stand above, in bold where the model is right.
    Position 0 of the text keeps out of the limits of the colours.

    Args:
        trajectory: of one text, or a part of it: `read[::2, 10:40]` draws every other layer.
        metric: one of `trajectory.FIGURES`; against another, also of
            `trajectory.DIVERGENCES`.
        lens: by name; by default the first. Several are drawn one above the other, in the
            same colours.
        of: whose probability, log_prob, logit or rank; see `Trajectory.figures`. KL has a
            square-root scale, rank a logarithmic one.
        versus: another text's trajectory, or another lens, whose figures are subtracted.
        width: of the figure in inches; its height and letters scale along. By default it is
            as wide as letters of 6.5 points need.

    Raises:
        InputError: there is no such metric, lens or tracked token, more than 60 positions,
            or nothing to compare with.
    """
    count = len(trajectory.positions)
    if count > _MOST_POSITIONS:
        raise InputError(
            f"{count} positions are too many to read in one figure; draw a part of at most "
            f"{_MOST_POSITIONS}, as read[:, :40], or plots.heatmap_pages"
        )
    (figure,) = _pages(trajectory, metric, lens, of, versus, width, size=count)
    return figure


def heatmap_pages(
    trajectory: Trajectory,
    metric: str = "probability",
    lens: str | Sequence[str] | None = None,
    *,
    of: str | int | None = None,
    versus: Trajectory | str | None = None,
    width: float | None = None,
    per_page: int = 24,
) -> Iterator["Figure"]:
    """A long text as several heatmaps in the same colours; see `heatmap`.

    Args:
        trajectory: as of `heatmap`.
        metric: likewise.
        lens: likewise.
        of: likewise.
        versus: likewise.
        width: likewise.
        per_page: positions on each, at most; 24 are 17 inches wide, 8 are 7.
    """
    if not 1 <= per_page <= _MOST_POSITIONS:
        raise InputError(f"per_page must be between 1 and {_MOST_POSITIONS}, got {per_page}")
    count = len(trajectory.positions)
    pages = -(-count // per_page)
    size = -(-count // pages)  # alike, so that the last one is not a stump
    yield from _pages(trajectory, metric, lens, of, versus, width, size)


def _pages(
    trajectory: Trajectory,
    metric: str,
    lens: str | Sequence[str] | None,
    of: str | int | None,
    versus: Trajectory | str | None,
    width: float | None,
    size: int,
) -> Iterator["Figure"]:
    """Heatmaps of so many positions each."""
    if lens is None:
        lens = next(iter(trajectory.readings))
    lenses = [lens] if isinstance(lens, str) else list(lens)
    if width is not None and not width > 0:
        raise InputError(f"width must be more than 0 inches, got {width}")
    if not lenses:
        raise InputError("there is no lens to draw; name one, or leave it out for the first")
    values = [trajectory.figures(metric, one, of=of, versus=versus) for one in lenses]
    colors = _colors(trajectory, values, metric, is_difference=versus is not None)
    label = _label(trajectory, metric, of, lenses, versus)
    for start in range(0, len(trajectory.positions), size):
        page = slice(start, start + size)
        other = versus[:, page] if isinstance(versus, Trajectory) else None
        drawn = {one: value[:, page] for one, value in zip(lenses, values, strict=True)}
        figure = _draw(trajectory[:, page], other, drawn, colors, label)
        if width is not None:
            scale(figure, width / figure.get_figwidth())
        yield figure


def _draw(
    trajectory: Trajectory,
    other: Trajectory | None,
    values: dict[str, Float[Tensor, "rows positions"]],
    colors: tuple[Any, Any],
    label: str,
) -> "Figure":
    """One figure, a panel for every lens, all in the same colours."""
    norm, color_map = colors
    count, n_rows = len(trajectory.positions), len(trajectory.rows)
    size = (1.9 + _CELL * count, 1.4 + 0.24 * n_rows * len(values))  # inches
    with new_figure(*size, has_tokens=True) as figure:
        panels = figure.subplots(len(values), squeeze=False, sharex=True)[:, 0].tolist()
        for axes, (lens, drawn) in zip(panels, values.items(), strict=True):
            image = axes.imshow(
                drawn.numpy(), origin="lower", aspect="auto", norm=norm, cmap=color_map
            )
            _write_cells(axes, trajectory, lens, image)
            axes.set_yticks(range(n_rows), trajectory.row_names, fontsize=7)
            axes.set_ylabel(f"layer, {lens} lens", fontsize=8)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        _name_positions(panels[-1], panels[0], trajectory, other)
        bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=30, format="%g")
        bar.set_label(_folded(label, size[1] - 1), fontsize=8)
    return figure


def _colors(
    trajectory: Trajectory,
    values: Sequence[Float[Tensor, "rows positions"]],
    metric: str,
    *,
    is_difference: bool,
) -> tuple[Any, Any]:
    """How values become colours: alike in all panels."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize, PowerNorm

    first = 1 if trajectory.positions[0] == 0 and len(trajectory.positions) > 1 else 0
    counted = [v for drawn in values for v in drawn[:, first:].flatten().tolist()]
    counted = [v for v in counted if math.isfinite(v)] or [1.0]
    low, high = min(counted), max(counted)
    norm: Any = Normalize(low, high)
    name = "cividis_r" if metric in ("rank", "kl_nats", "cross_entropy_nats") else "cividis"
    if is_difference and metric in FIGURES:
        most = max(abs(low), abs(high)) or 1.0
        norm, name = Normalize(-most, most), "RdBu"
    elif is_difference:
        norm = Normalize(0, max(high, 1e-9))
    elif metric == "probability":
        norm = Normalize(0, 1)
    elif metric == "rank":
        norm = LogNorm(1, max(high, 2))
    elif metric == "kl_nats":  # so that small ones can be told apart beside those of layer 0
        norm = PowerNorm(0.5, 0, max(high, 1e-9))
    return norm, colormaps[name].with_extremes(bad="0.85")


def _write_cells(axes: "Axes", trajectory: Trajectory, lens: str, image: Any) -> None:
    """The best token in every cell, and a frame where it is the model's already."""
    from matplotlib.patches import Rectangle

    best = trajectory.reading(lens).top_ids[..., 0].tolist()
    grounds = image.cmap(image.norm(image.get_array()))
    for y, line in enumerate(best):
        for x, token in enumerate(line):
            color = "black" if _luminance(grounds[y, x]) > _READABLE else "white"
            axes.text(
                x, y, _word(trajectory, token), ha="center", va="center", fontsize=6.5, color=color
            )
            if token == best[-1][x] and y < len(best) - 1:
                corner = (x - 0.46, y - 0.44)
                axes.add_patch(
                    Rectangle(corner, 0.92, 0.88, fill=False, lw=0.8, edgecolor=color, zorder=3)
                )
    rule: dict[str, Any] = {"color": "white", "linewidth": 2}
    if image.cmap.name == "RdBu":  # whose middle is white
        rule = {"color": "0.25", "linewidth": 1.2}
    axes.axhline(len(best) - 1.5, **rule)  # the model apart
    if trajectory.rows[0] == ("resid_pre", 0):
        axes.axhline(0.5, **rule)  # and the embeddings


def _word(trajectory: Trajectory, token_id: int) -> str:
    return drawable(trajectory.shown(token_id), _WIDEST_WORD)


def _folded(label: str, inches: float) -> str:
    """A label of 8 points in lines of at most this length."""
    return textwrap.fill(label, max(int(14 * inches), 12))


def _luminance(color: Sequence[float]) -> float:
    """Relative luminance of a colour, as WCAG 2 defines it."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _name_positions(
    below: "Axes", above: "Axes", trajectory: Trajectory, other: Trajectory | None
) -> None:
    """Input tokens and positions below, true next tokens above."""
    inputs = [_word(trajectory, i) for i in trajectory.input_ids.tolist()]
    if other is not None:
        others = [_word(other, i) for i in other.input_ids.tolist()]
        inputs = [a if a == b else f"{a}\n{b}" for a, b in zip(inputs, others, strict=True)]
    # Not turned: a token of code that is turned is another one.
    places = range(len(trajectory.positions))
    named = [f"{word}\n{place}" for word, place in zip(inputs, trajectory.positions, strict=True)]
    below.set_xticks(places, named, fontsize=7)
    width = _CELL * len(trajectory.positions) + 1
    below.set_xlabel(_folded("input token, position", width), fontsize=8)
    top = above.secondary_xaxis("top")
    following = trajectory.next_ids.tolist()
    nexts = ["" if i < 0 else _word(trajectory, i) for i in following]
    top.set_xticks(places, nexts, fontsize=7)
    top.set_xlabel(_folded("true next token, bold where the model is right", width), fontsize=8)
    top.tick_params(length=0)
    top.spines[:].set_visible(False)
    best = trajectory.reading().top_ids[-1, :, 0].tolist()
    for label, token, said in zip(top.get_xticklabels(), following, best, strict=True):
        if token == said:
            label.set_fontweight("bold")


def _label(
    trajectory: Trajectory,
    metric: str,
    of: str | int | None,
    lenses: Sequence[str],
    versus: Trajectory | str | None,
) -> str:
    """What the colours mean, and in what unit."""
    if metric not in FIGURES:
        label = DIVERGENCES[metric]
    else:
        label = FIGURES[metric]
        if metric in FIGURES_OF_A_TOKEN:
            of = whose(metric, of, versus)
            label += f" of {_KNOWN.get(of) or drawable(trajectory.shown(of))}"
    if isinstance(versus, str):
        label += f": {', '.join(lenses)} {'−' if metric in FIGURES else 'and'} {versus}"
    elif versus is not None:
        label = label.replace("model's", "model's (here)")
        label += ": this text − the other" if metric in FIGURES else ": this text and the other"
    return label
