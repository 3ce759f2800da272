"""One text through the layers as a picture: layers up, positions across."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import DIVERGENCES, TRAJECTORY_METRICS
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


def heatmap(
    data: Trajectory | Comparison,
    metric: str = "probability",
    lens: str | Sequence[str] | None = None,
    *,
    token: str | int = "top1",
    width: float | None = None,
) -> "Figure":
    """The best token of every row and position, coloured by a metric.

    The model is on top, the embeddings are at the bottom. Cells with the model's best token
    are outlined. True next tokens stand above, in bold where the model is right. Position 0
    does not influence the limits of the colours. A `Comparison` is coloured by the difference
    of its two sides, or by a divergence.

    Args:
        data: the whole or a part: `read[::2, 10:40]` draws every other layer.
        metric: one of `metrics.TRAJECTORY_METRICS`, or of `DIVERGENCES` for a comparison.
        lens: one or several names; by default the first. Several lenses are drawn one above the
            other with the same colours.
        token: the token of a probability, log_prob, logit or rank; see `Trajectory.values`.
        width: the width of the figure in inches, to which its height and letters are scaled.
            By default the letters have 6.5 points.

    Raises:
        InputError: there is no such metric, lens or tracked token, or there are more than 60
            positions.
    """
    count = len(_trajectory(data).positions)
    if count > _MAX_POSITIONS:
        raise InputError(
            f"{count} positions are too many to read in one figure; draw a part of at most "
            f"{_MAX_POSITIONS}, as read[:, :40], or plots.heatmap_pages"
        )
    (figure,) = heatmap_pages(data, metric, lens, token=token, width=width, per_page=count)
    return figure


def heatmap_pages(
    data: Trajectory | Comparison,
    metric: str = "probability",
    lens: str | Sequence[str] | None = None,
    *,
    token: str | int = "top1",
    width: float | None = None,
    per_page: int = 24,
) -> Iterator["Figure"]:
    """A long text as several heatmaps with the same colours.

    Args:
        data, metric, lens, token, width: as for `heatmap`.
        per_page: the largest number of positions per figure; 24 are 17 inches wide, 8 are 7.
    """
    if not 1 <= per_page <= _MAX_POSITIONS:
        raise InputError(f"per_page must be between 1 and {_MAX_POSITIONS}, got {per_page}")
    if width is not None and not width > 0:
        raise InputError(f"width must be more than 0 inches, got {width}")
    trajectory = _trajectory(data)
    lens = trajectory.lens_name() if lens is None else lens
    lenses = [lens] if isinstance(lens, str) else list(lens)
    if not lenses:
        raise InputError("there is no lens to draw; name one, or leave it out for the first")
    values = {one: data.values(metric, one, token=token) for one in lenses}
    scale = ColorScale.from_values(
        metric,
        [(trajectory, one) for one in values.values()],
        is_difference=isinstance(data, Comparison),
    )
    label = _label(data, metric, token, lenses)
    count = len(trajectory.positions)
    size = -(-count // -(-count // per_page))  # pages of nearly equal length
    for start in range(0, count, size):
        page = slice(start, start + size)
        drawn = {one: value[:, page] for one, value in values.items()}
        figure = _draw(data[:, page], drawn, scale, label)
        if width is not None:
            resize(figure, width / figure.get_figwidth())
        yield figure


def _trajectory(data: Trajectory | Comparison) -> Trajectory:
    return data.trajectory if isinstance(data, Comparison) else data


def _draw(
    data: Trajectory | Comparison,
    values: dict[str, Float[Tensor, "rows positions"]],
    scale: ColorScale,
    label: str,
) -> "Figure":
    """One figure with a panel for every lens."""
    trajectory = _trajectory(data)
    count, n_rows = len(trajectory.positions), len(trajectory.rows)
    size = (1.9 + _CELL * count, 1.4 + 0.24 * n_rows * len(values))  # inches
    norm, color_map = scale.norm(), scale.colors()
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
        _name_inputs(panels[-1], data)
        _name_next_tokens(panels[0], trajectory)
        bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=30, format="%g")
        bar.set_label(_folded(label, size[1] - 1), fontsize=8)
    return figure


def _write_cells(axes: "Axes", trajectory: Trajectory, lens: str, image: "AxesImage") -> None:
    """Write the best token into every cell and frame it where it is the model's."""
    from matplotlib.patches import Rectangle

    best = trajectory.predictions[lens].top_ids[..., 0]
    colors = image.to_rgba(image.get_array())  # type: ignore[arg-type]
    for y, line in enumerate(best):
        for x, word in enumerate(_words(trajectory, line)):
            color = ink(colors[y, x])
            axes.text(x, y, word, ha="center", va="center", fontsize=6.5, color=color)
            if line[x] == best[-1, x] and y < len(best) - 1:
                frame = Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, edgecolor=color)
                frame.set(fill=False, linewidth=0.8, zorder=3)
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
