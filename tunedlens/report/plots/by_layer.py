"""Figures of an evaluation: every lens by layer, by position, by translator."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tunedlens.evaluation import MODEL, Evaluation
from tunedlens.metrics import METRICS
from tunedlens.report.plots.style import (
    MODEL_COLOR,
    name_lines,
    new_figure,
    plain_log_ticks,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LAYER = "layer (0 is the embeddings)"
_HATCHES = ("", "///", "...", "xxx", "\\\\\\")
_MOST_ANNOTATED = 16
"""Layers up to which a transfer matrix has its numbers written in."""


def by_layer(evaluation: Evaluation, metric: str) -> "Figure":
    """One figure of every lens by layer, and the model's own as a line where it has one.

    Bands are two standard errors to either side. A first layer that dwarfs all others is left
    out, with its value.
    """
    with new_figure(5.0, 3.2) as figure:
        name_lines(*draw_by_layer(figure.subplots(), evaluation, metric))
    return figure


def agreement_by_layer(evaluation: Evaluation) -> "Figure":
    """How often a lens and the model agree on the best token: among the best one, or ten."""
    with new_figure(8.6, 3.2) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        lines = [
            draw_by_layer(left, evaluation, "top1_agreement"),
            draw_by_layer(right, evaluation, "top10_agreement"),
        ]
        left.set_ylim(0, 1.02)
        for drawn in lines:
            name_lines(*drawn)
    return figure


def prediction_depth(evaluation: Evaluation) -> "Figure":
    """Share of tokens whose best token no longer changes from a layer on, for every lens."""
    with new_figure(5.0, 3.2) as figure:
        draw_prediction_depth(figure.subplots(), evaluation)
    return figure


def transfer(evaluation: Evaluation) -> "Figure":
    """KL(model ‖ lens) of every translator at every layer, on a log colour scale."""
    from matplotlib.colors import LogNorm

    lenses = list(evaluation.transfer)
    matrices = [evaluation.transfer[lens]["kl_nats"].values for lens in lenses]
    every = [value for matrix in matrices for row in matrix for value in row if value]
    size = max(2.6, 0.34 * evaluation.n_layers)
    with new_figure(size * len(lenses) + 1.1, size + 0.5) as figure:
        grid = figure.subplots(1, len(lenses), squeeze=False, sharey=True)[0]
        norm = LogNorm(min(every), max(every))
        for axes, lens, matrix in zip(grid, lenses, matrices, strict=True):
            shown: Any = [[math.nan if v is None else v for v in row] for row in matrix]
            image = axes.imshow(shown, origin="lower", norm=norm, cmap="cividis")
            axes.set_title(f"{lens} lens", fontsize=9)
            axes.set_xlabel("used at layer")
            ticks = range(0, evaluation.n_layers, max(1, evaluation.n_layers // 12))
            axes.set_xticks(ticks)
            axes.set_yticks(ticks)
            if evaluation.n_layers <= _MOST_ANNOTATED:
                _write_numbers(axes, shown, norm)
        grid[0].set_ylabel("translator of layer")
        figure.colorbar(image, ax=list(grid), label=METRICS["kl_nats"].title, shrink=0.85)
    return figure


def by_position(evaluation: Evaluation) -> "Figure":
    """KL(model ‖ lens) by position in the block, at up to four layers; position 0 is a mark.

    Neighbouring positions are averaged, so that there are at most 64 points.
    """
    n_layers = evaluation.n_layers
    layers = sorted({round(i * (n_layers - 1) / 3) for i in range(4)})
    lenses = [lens for lens in evaluation.lenses if lens in evaluation.by_position]
    look = styles(evaluation.lenses)
    with new_figure(2.3 * len(layers) + 1.0, 2.8) as figure:
        grid = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
        ends = {}
        for axes, layer in zip(grid, layers, strict=True):
            axes.set_yscale("log")
            for lens in lenses:
                row = evaluation.by_position[lens]["kl_nats"]
                values, errors = row.values[layer], row.standard_errors[layer]
                style = look[lens] | {"marker": ""}
                if points := _averaged(values, errors):
                    x, y, error = zip(*points, strict=True)
                    _line_with_band(axes, x, y, error, style, is_log=True)
                    ends[lens] = y[-1]
                if values[0]:
                    mark = look[lens]["marker"] or "_"
                    axes.plot([0], [values[0]], color=style["color"], marker=mark)
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_xlabel("position in the block")
        grid[0].set_ylabel(METRICS["kl_nats"].title)
        for axes in grid:
            plain_log_ticks(axes)
        name_lines(grid[-1], ends, {lens: look[lens]["color"] for lens in lenses})
    return figure


def overview(evaluation: Evaluation) -> "Figure":
    """KL, perplexity, top-1 agreement and prediction depth, two by two."""
    with new_figure(9.2, 6.2) as figure:
        (kl, perplexity), (agreement, depth) = figure.subplots(2, 2)
        lines = [
            draw_by_layer(kl, evaluation, "kl_nats"),
            draw_by_layer(perplexity, evaluation, "perplexity"),
            draw_by_layer(agreement, evaluation, "top1_agreement"),
        ]
        draw_prediction_depth(depth, evaluation)
        for drawn in lines:
            name_lines(*drawn)
    return figure


class Drawing(NamedTuple):
    """A figure that can be drawn from an evaluation."""

    draw: Callable[[Evaluation], "Figure"]
    caption: str
    is_there: Callable[[Evaluation], bool] = lambda _: True


def _of(metric: str) -> Callable[[Evaluation], "Figure"]:
    return lambda evaluation: by_layer(evaluation, metric)


_BAND = "bands are two standard errors"
DRAWINGS = {
    "overview": Drawing(overview, "KL, perplexity, agreement and prediction depth at a glance"),
    "kl_by_layer": Drawing(
        _of("kl_nats"), f"How far each lens is from what the model says in the end; {_BAND}"
    ),
    "perplexity_by_layer": Drawing(
        _of("perplexity"), f"Perplexity on the true next token; the line is the model's; {_BAND}"
    ),
    "bits_per_byte_by_layer": Drawing(
        _of("bits_per_byte"), f"Cross-entropy in bits per byte of text; {_BAND}"
    ),
    "bias_by_layer": Drawing(
        _of("bias_nats"), f"KL between the mean distributions of model and lens; {_BAND}"
    ),
    "agreement_by_layer": Drawing(
        agreement_by_layer,
        f"How often the model's best token is the lens's best, and among its best ten; {_BAND}",
    ),
    "prediction_depth": Drawing(
        prediction_depth, "From which layer on the best token no longer changes"
    ),
    "transfer": Drawing(
        transfer,
        "Every layer's translator at every layer",
        lambda evaluation: bool(evaluation.transfer),
    ),
    "by_position": Drawing(
        by_position,
        f"KL by position in the block, its first position as a mark; {_BAND}",
        lambda evaluation: bool(evaluation.by_position),
    ),
}
"""Every figure of a report, by the name of its files."""


def draw_by_layer(
    axes: "Axes", evaluation: Evaluation, metric: str
) -> tuple["Axes", dict[str, float], dict[str, Any]]:
    """Lines and bands of one metric on axes that are there; returns what names the lines."""
    shown, lenses = METRICS[metric], evaluation.lenses
    look, layers = styles(lenses), list(range(evaluation.n_layers))
    columns = {lens: evaluation.by_layer(lens, metric) for lens in lenses}
    values = {lens: [estimate.value for estimate in columns[lens]] for lens in lenses}
    top = math.inf
    if shown.is_log:
        axes.set_yscale("log")
        top = _top_of_the_scale(list(values.values()))
    for lens in lenses:
        line = [value if value <= top else math.nan for value in values[lens]]
        errors = [estimate.standard_error or 0.0 for estimate in columns[lens]]
        color = look[lens]["color"]
        _line_with_band(axes, layers, line, errors, look[lens], is_log=shown.is_log)
        if values[lens][0] > top:
            axes.annotate(f"↑ {values[lens][0]:.0e}", (0, top), (4, -3), color=color,
                          textcoords="offset points", va="top")  # fmt: skip
    ends = {lens: values[lens][-1] for lens in lenses}
    colors = {lens: look[lens]["color"] for lens in lenses}
    own = [r.value for r in evaluation.results if (r.lens, r.metric) == (MODEL, metric)]
    if own:
        axes.axhline(own[0], color=MODEL_COLOR, linewidth=1)
        ends[MODEL], colors[MODEL] = own[0], MODEL_COLOR
        if shown.is_log:
            axes.set_ylim(bottom=own[0] / 1.8)
    if top < math.inf:
        axes.set_ylim(top=top)
    axes.set_xlabel(_LAYER)
    axes.set_ylabel(shown.title)
    axes.set_xticks(layers[:: max(1, len(layers) // 12)])
    if shown.is_log:
        plain_log_ticks(axes)
    return axes, ends, colors


def draw_prediction_depth(axes: "Axes", evaluation: Evaluation) -> None:
    """Share of tokens by the layer from which their best token no longer changes."""
    lenses = [lens for lens in evaluation.lenses if lens not in evaluation.constant]
    look, layers = styles(evaluation.lenses), list(range(evaluation.n_layers + 1))
    width = 0.8 / max(1, len(lenses))
    for index, lens in enumerate(lenses):
        column = evaluation.by_layer(lens, "prediction_depth")
        axes.bar(
            [layer + (index - (len(lenses) - 1) / 2) * width for layer in layers],
            [estimate.value for estimate in column],
            width,
            yerr=[2 * (estimate.standard_error or 0.0) for estimate in column],
            error_kw={"elinewidth": 0.8},
            color=look[lens]["color"],
            hatch=_HATCHES[index % len(_HATCHES)],
            edgecolor="white",
            linewidth=0,
        )
        mean = evaluation.of_lens(lens, "mean_prediction_depth").value
        axes.annotate(
            f"{lens}, mean {mean:.1f}",
            (0, 1),
            xycoords="axes fraction",
            xytext=(8, -4 - 11 * index),
            textcoords="offset points",
            color=look[lens]["color"],
            va="top",
            fontsize=8.5,
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer from which the best token stays")
    axes.set_ylabel(METRICS["prediction_depth"].title)
    axes.set_xticks(layers[:: max(1, len(layers) // 12)])


def _line_with_band(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[float],
    errors: Sequence[float],
    style: dict[str, Any],
    *,
    is_log: bool,
) -> None:
    """A line, and two standard errors to either side of it; on a log scale above a tenth of it."""
    axes.plot(x, y, **style)
    floor = [value / 10 if is_log else -math.inf for value in y]
    low = [max(v - 2 * e, f) for v, e, f in zip(y, errors, floor, strict=True)]
    high = [v + 2 * e for v, e in zip(y, errors, strict=True)]
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _top_of_the_scale(values: list[list[float]]) -> float:
    """Infinite, or short of a first layer that is 50 times above all the others."""
    rest = max((value for line in values for value in line[1:]), default=0.0)
    if not rest or max(line[0] for line in values) <= 50 * rest:
        return math.inf
    return 2 * max(value for line in values for value in line if value <= 50 * rest)


def _write_numbers(axes: "Axes", matrix: list[list[float]], norm: Any) -> None:
    for row, line in enumerate(matrix):
        for column, value in enumerate(line):
            if math.isfinite(value):
                color = "white" if norm(value) < 0.55 else "black"
                text = f"{value:.2g}" if value < 10 else f"{value:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=6)


def _averaged(
    values: list[float | None], errors: list[float | None]
) -> list[tuple[float, float, float]]:
    """Position, figure and error of runs of positions after the first one."""
    run = max(1, -(-(len(values) - 1) // 64))
    points = []
    for start in range(1, len(values), run):
        pairs = zip(values[start : start + run], errors[start : start + run], strict=True)
        there = [(value, error or 0.0) for value, error in pairs if value is not None]
        if there:
            # Positions of one block are not independent, so their errors are not made smaller.
            value, error = (sum(part) / len(there) for part in zip(*there, strict=True))
            points.append((start + (len(there) - 1) / 2, value, error))
    return points
