"""One text through the layers as a figure: layers are rows, positions are columns."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import DIVERGENCES, TRAJECTORY_METRICS, full_name
from tunedlens.report.plots.colors import ColorScale, ink
from tunedlens.report.plots.style import drawable, new_figure, resize
from tunedlens.trajectories import TOKENS, Comparison, Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_MAX_POSITIONS = 60
_MAX_WORD = 6.0
"""The width of the widest word in units of its font size."""
_CELL = 0.62
"""The width of a cell in inches."""
_MARGINS = 1.9
"""The width of the names of layers and of the colour bar in inches."""
_POINTS = 6.5
"""The size of the words in cells."""
_MIN_POINTS = 5.0
"""The smallest size that they may be scaled to."""


def heatmap(
    data: Trajectory | Comparison,
    metric: str = "probability",
    lens: str | Sequence[str] | None = None,
    *,
    token: str | int | None = None,
    title: str | None = None,
    limits: tuple[float, float] | None = None,
    cmap: str | None = None,
    width: float | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """Draw the best token of every row and position, coloured by a metric.

    The model is the top row, and the embeddings are the bottom row. Cells with the model's best
    token are outlined. The true next tokens are written at the top, in bold where the model
    predicts them. A `Comparison` is coloured by the difference of its two sides, or by a
    divergence.

    Args:
        data: a trajectory or a part of it: `read[::2, 10:40]` draws every other layer.
        metric: one of `metrics.TRAJECTORY_METRICS`, or of `DIVERGENCES` for a comparison; short
            names such as `kl` and `prob` are allowed.
        lens: one name or several; by default the first lens. Several lenses are drawn one above
            the other on one colour scale.
        token: the token of a probability, log_prob, logit or rank; see `Trajectory.values` and
            `Comparison.values`.
        title: a title for the figure.
        limits: the values of the first and the last colour. By default they are chosen from the
            values without position 0 and outliers.
        cmap: a colour map of matplotlib.
        width: the width of the figure in inches. Letters are scaled with it, down to 5 points,
            and a longer text is divided into several rows. By default there is one row, with
            letters of 6.5 points.
        ax: axes to draw one lens into. Their figure keeps its size.

    Raises:
        InputError: there is no such metric, lens, tracked token or colour map, or there are more
            than 60 positions.
    """
    count = len(_trajectory(data).positions)
    if count > _MAX_POSITIONS:
        raise InputError(
            f"{count} positions are too many to read in one figure; draw at most "
            f"{_MAX_POSITIONS}, as in read[:, :40], or use plots.heatmap_pages"
        )
    panels = _Panels.of(data, metric, lens, token=token, limits=limits, cmap=cmap)
    return (
        panels.draw(slice(None), title, width) if ax is None else panels.draw_into(ax, title, width)
    )


def heatmap_pages(
    data: Trajectory | Comparison,
    metric: str = "probability",
    lens: str | Sequence[str] | None = None,
    *,
    token: str | int | None = None,
    title: str | None = None,
    limits: tuple[float, float] | None = None,
    cmap: str | None = None,
    width: float | None = None,
    per_page: int = 24,
) -> Iterator["Figure"]:
    """Draw a long text as several heatmaps on one colour scale.

    Args:
        data, metric, lens, token, title, limits, cmap, width: as for `heatmap`.
        per_page: the largest number of positions per figure; 24 are 17 inches wide, 8 are 7.
    """
    if not 1 <= per_page <= _MAX_POSITIONS:
        raise InputError(f"per_page must be between 1 and {_MAX_POSITIONS}, got {per_page}")
    panels = _Panels.of(data, metric, lens, token=token, limits=limits, cmap=cmap)
    for page in _pieces(len(_trajectory(data).positions), per_page):
        yield panels.draw(page, title, width)


def _pieces(count: int, longest: int) -> list[slice]:
    """Pieces of nearly equal length."""
    size = -(-count // -(-count // longest))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _trajectory(data: Trajectory | Comparison) -> Trajectory:
    return data.trajectory if isinstance(data, Comparison) else data


@dataclass(frozen=True, eq=False)
class _Panels:
    """The panels of a heatmap: one for every lens, on one colour scale."""

    data: Trajectory | Comparison
    values: dict[str, Float[Tensor, "rows positions"]]
    """By lens."""
    scale: ColorScale
    label: str

    @classmethod
    def of(
        cls,
        data: Trajectory | Comparison,
        metric: str,
        lens: str | Sequence[str] | None,
        *,
        token: str | int | None,
        limits: tuple[float, float] | None,
        cmap: str | None,
    ) -> "_Panels":
        """Check what is asked for and look up its values."""
        trajectory, metric = _trajectory(data), full_name(metric)
        lens = trajectory.lens_name() if lens is None else lens
        lenses = [lens] if isinstance(lens, str) else list(lens)
        if not lenses:
            raise InputError("the list of lenses is empty; name one, or leave it out for the first")
        values = {one: data.values(metric, one, token=token) for one in lenses}
        is_difference = isinstance(data, Comparison)
        counted = [(trajectory, one) for one in values.values()]
        scale = ColorScale.from_values(metric, counted, is_difference=is_difference)
        if token is None:
            token = "final" if is_difference or metric == "rank" else "top1"
        return cls(data, values, scale.changed(limits, cmap), _label(data, metric, token, lenses))

    def draw(self, page: slice, title: str | None, width: float | None) -> "Figure":
        """A figure of some positions, folded into rows if letters would be too small."""
        if width is not None and not width > 0:
            raise InputError(f"width must be more than 0 inches, got {width}")
        positions = range(len(_trajectory(self.data).positions))[page]
        longest = len(positions)
        if width is not None:
            longest = min(longest, int((width * _POINTS / _MIN_POINTS - _MARGINS) / _CELL))
        if longest < 1:
            least = (_MARGINS + _CELL) * _MIN_POINTS / _POINTS
            raise InputError(
                f"width must be at least {least:.1f} inches to be readable, got {width}"
            )
        folds = [positions[piece] for piece in _pieces(len(positions), longest)]
        columns, n_rows = len(folds[0]), len(_trajectory(self.data).rows)
        height = 1.4 + 0.24 * n_rows * len(self.values)
        size = (_MARGINS + _CELL * columns, height * len(folds) + 0.3 * bool(title))  # inches
        with new_figure(*size, has_tokens=True) as figure:
            parts = (
                figure.subfigures(len(folds), squeeze=False)[:, 0] if len(folds) > 1 else [figure]
            )
            for part, fold in zip(parts, folds, strict=True):
                panels = part.subplots(len(self.values), squeeze=False, sharex=True)[:, 0].tolist()
                self._fill(panels, slice(fold.start, fold.stop), columns, height)
            if title:
                figure.suptitle(drawable(title), fontsize=9)
        if width is not None:
            resize(figure, width / figure.get_figwidth())
        return figure

    def draw_into(self, axes: "Axes", title: str | None, width: float | None) -> "Figure":
        """Draw the one lens into axes that exist."""
        figure = axes.get_figure(root=True)
        if width is not None or len(self.values) > 1 or figure is None:
            raise InputError("ax takes one lens and the width of its figure; leave width out")
        count = len(_trajectory(self.data).positions)
        self._fill([axes], slice(None), count, figure.get_figheight())
        if title:
            axes.set_title(drawable(title), fontsize=9)
        return figure

    def _fill(self, panels: list["Axes"], page: slice, columns: int, height: float) -> None:
        """Draw some positions into axes that have room for a number of columns."""
        data = self.data[:, page]
        trajectory = _trajectory(data)
        norm, color_map = self.scale.norm(), self.scale.colors()
        for axes, (lens, values) in zip(panels, self.values.items(), strict=True):
            drawn = values[:, page]
            image = axes.imshow(
                drawn.numpy(), origin="lower", aspect="auto", norm=norm, cmap=color_map
            )
            axes.set_xlim(-0.5, columns - 0.5)
            _write_cells(axes, trajectory, lens, image)
            axes.set_yticks(range(len(trajectory.rows)), trajectory.row_names, fontsize=7)
            axes.set_ylabel(f"layer, {lens} lens", fontsize=8)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        _name_inputs(panels[-1], data)
        _name_next_tokens(panels[0], trajectory)
        bar = panels[0].figure.colorbar(
            image, ax=panels, pad=0.01, aspect=30, format="%g", extend=self._beyond()
        )
        bar.set_label(_folded(self.label, height - 1), fontsize=8)

    def _beyond(self) -> str:
        """The ends of the colour bar beyond which there are values, as matplotlib calls them."""
        known = torch.cat([values[values.isfinite()] for values in self.values.values()])
        is_below, is_above = (
            bool((known < self.scale.low).any()),
            bool((known > self.scale.high).any()),
        )
        return {(True, True): "both", (True, False): "min", (False, True): "max"}.get(
            (is_below, is_above), "neither"
        )


def _write_cells(axes: "Axes", trajectory: Trajectory, lens: str, image: "AxesImage") -> None:
    """Write the best token into every cell and frame it where it is the model's."""
    from matplotlib.patches import Rectangle

    best = trajectory.predictions[lens].top_ids[..., 0]
    colors = image.to_rgba(image.get_array())  # type: ignore[arg-type]
    for y, line in enumerate(best):
        for x, word in enumerate(_words(trajectory, line)):
            color = ink(colors[y, x])
            cell = axes.text(x, y, word, ha="center", va="center", fontsize=6.5, color=color)
            cell.set_in_layout(False)  # it is inside the axes, and measuring it is slow
            if line[x] == best[-1, x] and y < len(best) - 1:
                frame = Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, edgecolor=color)
                frame.set(fill=False, linewidth=0.8, zorder=3, in_layout=False)
                axes.add_patch(frame)
    dividers = [len(best) - 1.5]  # below the model
    if trajectory.rows[0] == ("resid_pre", 0):
        dividers.append(0.5)  # above the embeddings
    # The middle of RdBu is white.
    color, width = ("0.25", 1.2) if image.cmap.name == "RdBu" else ("white", 2.0)
    for height in dividers:
        axes.axhline(height, color=color, linewidth=width)


def _words(trajectory: Trajectory, ids: Int[Tensor, " positions"]) -> list[str]:
    """Tokens as they are drawn; none where the id is -1."""
    known = trajectory.vocabulary
    return ["" if i < 0 else drawable(known[i].shown, _MAX_WORD) for i in ids.tolist()]


def _folded(label: str, inches: float) -> str:
    """A label of 8 points in lines that are at most this long."""
    return textwrap.fill(label, max(int(14 * inches), 12))


def _name_inputs(axes: "Axes", data: Trajectory | Comparison) -> None:
    """Write input tokens and positions below."""
    trajectory = _trajectory(data)
    words = _words(trajectory, trajectory.input_ids)
    if isinstance(data, Comparison):
        others = _words(data.baseline, data.baseline.input_ids)
        words = [a if a == b else f"{a}\n{b}" for a, b in zip(words, others, strict=True)]
    # The labels are horizontal, because a rotated token of code could be read as another one.
    names = [f"{word}\n{at}" for word, at in zip(words, trajectory.positions, strict=True)]
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel(_folded("input token, position", _CELL * len(names) + 1), fontsize=8)


def _name_next_tokens(axes: "Axes", trajectory: Trajectory) -> None:
    """Write true next tokens above."""
    names = _words(trajectory, trajectory.next_ids)
    top = axes.secondary_xaxis("top")
    top.set_xticks(range(len(names)), names, fontsize=7)
    label = "true next token, bold where the model is right"
    top.set_xlabel(_folded(label, _CELL * len(names) + 1), fontsize=8)
    top.tick_params(length=0)
    top.spines[:].set_visible(False)
    is_right = (trajectory.next_ids == trajectory.final_ids).tolist()
    for text in itertools.compress(top.get_xticklabels(), is_right):
        text.set_fontweight("bold")


def _label(
    data: Trajectory | Comparison, metric: str, token: str | int, lenses: Sequence[str]
) -> str:
    """The meaning of the colours, with a unit."""
    trajectory, shown = _trajectory(data), (TRAJECTORY_METRICS | DIVERGENCES)[metric]
    label = shown.label
    if shown.has_token:
        named = TOKENS.get(token) or trajectory.vocabulary[trajectory.token_id(token)].shown
        label += f" of {drawable(named)}"
    if not isinstance(data, Comparison):
        return label
    sign = "and" if metric in DIVERGENCES else "−"
    if data.has_one_text:
        return f"{label}: {', '.join(lenses)} {sign} {data.baseline_lens(lenses[0])}"
    names = [data.trajectory.model, data.baseline.model]
    if names[0] == names[1]:
        names = ["this text", "the baseline"]
    label = label.replace("model's", "model's (here)")
    return f"{label}: {names[0]} {sign} {names[1]}"
