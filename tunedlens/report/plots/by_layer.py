"""Plots of an evaluation: every lens by layer, by position and by translator."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tunedlens.evaluation import MODEL, Evaluation
from tunedlens.metrics import METRICS
from tunedlens.report.plots.style import (
    MODEL_COLOR,
    Style,
    name_lines,
    new_figure,
    plain_log_ticks,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

_LAYER = "layer (0 is the embeddings)"
_HATCHES = ("", "///", "...", "xxx", "\\\\\\")
_MAX_ANNOTATED_LAYERS = 16
"""With more layers, the cells of a transfer matrix are too small for numbers."""


def by_layer(evaluation: Evaluation, metric: str) -> "Figure":
    """One metric of every lens by layer, with a line for the model if it has a value.

    Bands are two standard errors on either side. If the value of the first layer dwarfs all
    others, it is written at the top instead of drawn.
    """
    with new_figure(5.0, 3.2) as figure:
        name_lines(*draw_by_layer(figure.subplots(), evaluation, metric))
    return figure


def agreement_by_layer(evaluation: Evaluation) -> "Figure":
    """Top-1 and top-10 agreement of every lens by layer."""
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
    """Fractions of tokens by prediction depth, for every lens."""
    with new_figure(5.0, 3.2) as figure:
        draw_prediction_depth(figure.subplots(), evaluation)
    return figure


def transfer(evaluation: Evaluation) -> "Figure":
    """KL(model ‖ lens) of every translator at every layer, on a log colour scale."""
    from matplotlib.colors import LogNorm

    lenses = list(evaluation.transfer)
    matrices = [evaluation.transfer[lens]["kl_nats"].values for lens in lenses]
    values = [value for matrix in matrices for row in matrix for value in row if value]
    size = max(2.6, 0.34 * evaluation.n_layers)
    with new_figure(size * len(lenses) + 1.1, size + 0.5) as figure:
        grid = figure.subplots(1, len(lenses), squeeze=False, sharey=True)[0]
        norm = LogNorm(min(values), max(values))
        for axes, lens, matrix in zip(grid, lenses, matrices, strict=True):
            shown = [[math.nan if v is None else v for v in row] for row in matrix]
            image = axes.imshow(shown, origin="lower", norm=norm, cmap="cividis")
            axes.set_title(f"{lens} lens", fontsize=9)
            axes.set_xlabel("applied at layer")
            ticks = range(0, evaluation.n_layers, max(1, evaluation.n_layers // 12))
            axes.set_xticks(ticks)
            axes.set_yticks(ticks)
            if evaluation.n_layers <= _MAX_ANNOTATED_LAYERS:
                _write_numbers(axes, shown, norm)
        grid[0].set_ylabel("translator of layer")
        figure.colorbar(image, ax=list(grid), label=METRICS["kl_nats"].title, shrink=0.85)
    return figure


def by_position(evaluation: Evaluation) -> "Figure":
    """KL(model ‖ lens) by position in the block, at up to four layers.

    Position 0 is a separate mark. Neighbouring positions are averaged to at most 64 points.
    """
    n_layers = evaluation.n_layers
    layers = sorted({round(i * (n_layers - 1) / 3) for i in range(4)})
    lenses = [lens for lens in evaluation.lenses if lens in evaluation.by_position]
    line_styles = styles(evaluation.lenses)
    with new_figure(2.3 * len(layers) + 1.0, 2.8) as figure:
        grid = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
        ends = {}
        for axes, layer in zip(grid, layers, strict=True):
            axes.set_yscale("log")
            for lens in lenses:
                row = evaluation.by_position[lens]["kl_nats"]
                values, errors = row.values[layer], row.standard_errors[layer]
                style = line_styles[lens] | {"marker": ""}
                if points := _averaged(values, errors):
                    x, y, error = zip(*points, strict=True)
                    _line_with_band(axes, x, y, error, style, is_log=True)
                    ends[lens] = y[-1]
                if values[0]:
                    mark = line_styles[lens]["marker"] or "_"
                    axes.plot([0], [values[0]], color=style["color"], marker=mark)
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_xlabel("position in the block")
        grid[0].set_ylabel(METRICS["kl_nats"].title)
        for axes in grid:
            plain_log_ticks(axes)
        name_lines(grid[-1], ends, {lens: line_styles[lens]["color"] for lens in lenses})
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
    """A plot of an evaluation."""

    draw: Callable[[Evaluation], "Figure"]
    caption: str
    has_data: Callable[[Evaluation], bool] = lambda _: True


def _by_layer(metric: str) -> Callable[[Evaluation], "Figure"]:
    return lambda evaluation: by_layer(evaluation, metric)


_BAND = "The bands are two standard errors wide on either side."
DRAWINGS = {
    "overview": Drawing(
        overview, "KL, perplexity, top-1 agreement and prediction depth of every lens."
    ),
    "kl_by_layer": Drawing(
        _by_layer("kl_nats"),
        f"KL from the model's final distribution to that of each lens. {_BAND}",
    ),
    "perplexity_by_layer": Drawing(
        _by_layer("perplexity"),
        f"Perplexity of the true next token; the grey line is the model. {_BAND}",
    ),
    "bits_per_byte_by_layer": Drawing(
        _by_layer("bits_per_byte"),
        f"Cross-entropy in bits per byte of text; the grey line is the model. {_BAND}",
    ),
    "bias_by_layer": Drawing(
        _by_layer("bias_nats"), f"KL between the mean distributions of model and lens. {_BAND}"
    ),
    "agreement_by_layer": Drawing(
        agreement_by_layer,
        "Fraction of tokens where the model's most probable token is the lens's most probable "
        f"one (left) or among its top ten (right). {_BAND}",
    ),
    "prediction_depth": Drawing(
        prediction_depth,
        "Fraction of tokens by the first layer from which the most probable token no longer "
        "changes. The error bars are two standard errors long on either side.",
    ),
    "transfer": Drawing(
        transfer,
        "KL when the translator of one layer is applied at another.",
        lambda evaluation: bool(evaluation.transfer),
    ),
    "by_position": Drawing(
        by_position,
        f"KL by position in the block; the first position is a separate mark. {_BAND}",
        lambda evaluation: bool(evaluation.by_position),
    ),
}
"""The plots of a report by the name of their files."""


def draw_by_layer(
    axes: "Axes", evaluation: Evaluation, metric: str
) -> tuple["Axes", dict[str, float], dict[str, str]]:
    """Draw one metric by layer; returns the arguments of `name_lines`."""
    shown, lenses = METRICS[metric], evaluation.lenses
    line_styles, layers = styles(lenses), list(range(evaluation.n_layers))
    columns = {lens: evaluation.by_layer(lens, metric) for lens in lenses}
    values = {lens: [estimate.value for estimate in columns[lens]] for lens in lenses}
    top = math.inf
    if shown.is_log:
        axes.set_yscale("log")
        top = _top_of_scale(list(values.values()))
    for lens in lenses:
        line = [value if value <= top else math.nan for value in values[lens]]
        errors = [estimate.standard_error or 0.0 for estimate in columns[lens]]
        color = line_styles[lens]["color"]
        _line_with_band(axes, layers, line, errors, line_styles[lens], is_log=shown.is_log)
        if values[lens][0] > top:
            below = (4, -3 - 11 * len(axes.texts))  # one line under the last
            axes.annotate(f"↑ {values[lens][0]:.0e}", (0, top), below, color=color,
                          textcoords="offset points", va="top")  # fmt: skip
    ends = {lens: values[lens][-1] for lens in lenses}
    colors = {lens: line_styles[lens]["color"] for lens in lenses}
    of_model = [r.value for r in evaluation.results if (r.lens, r.metric) == (MODEL, metric)]
    if of_model:
        axes.axhline(of_model[0], color=MODEL_COLOR, linewidth=1)
        ends[MODEL], colors[MODEL] = of_model[0], MODEL_COLOR
        if shown.is_log:
            axes.set_ylim(bottom=of_model[0] / 1.8)
    if top < math.inf:
        axes.set_ylim(top=top)
    axes.set_xlabel(_LAYER)
    axes.set_ylabel(shown.title)
    axes.set_xticks(layers[:: max(1, len(layers) // 12)])
    if shown.is_log:
        plain_log_ticks(axes)
    return axes, ends, colors


def draw_prediction_depth(axes: "Axes", evaluation: Evaluation) -> None:
    """Draw the fractions of tokens by prediction depth."""
    lenses = [lens for lens in evaluation.lenses if lens not in evaluation.constant]
    line_styles, layers = styles(evaluation.lenses), list(range(evaluation.n_layers + 1))
    width = 0.8 / max(1, len(lenses))
    for index, lens in enumerate(lenses):
        column = evaluation.by_layer(lens, "prediction_depth")
        axes.bar(
            [layer + (index - (len(lenses) - 1) / 2) * width for layer in layers],
            [estimate.value for estimate in column],
            width,
            yerr=[2 * (estimate.standard_error or 0.0) for estimate in column],
            error_kw={"elinewidth": 0.8},
            color=line_styles[lens]["color"],
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
            color=line_styles[lens]["color"],
            va="top",
            fontsize=8.5,
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prediction depth, layers")
    axes.set_ylabel(METRICS["prediction_depth"].title)
    axes.set_xticks(layers[:: max(1, len(layers) // 12)])


def _line_with_band(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[float],
    errors: Sequence[float],
    style: Style,
    *,
    is_log: bool,
) -> None:
    """Draw a line with a band of two standard errors; on a log scale not below a tenth of it."""
    axes.plot(x, y, **style)
    floor = [value / 10 if is_log else -math.inf for value in y]
    low = [max(v - 2 * e, f) for v, e, f in zip(y, errors, floor, strict=True)]
    high = [v + 2 * e for v, e in zip(y, errors, strict=True)]
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _top_of_scale(values: list[list[float]]) -> float:
    """A limit below the first layer if its value is over 50 times all others; else infinity."""
    rest = max((value for line in values for value in line[1:]), default=0.0)
    if not rest or max(line[0] for line in values) <= 50 * rest:
        return math.inf
    return 2 * max(value for line in values for value in line if value <= 50 * rest)


def _write_numbers(axes: "Axes", matrix: list[list[float]], norm: "LogNorm") -> None:
    for row, line in enumerate(matrix):
        for column, value in enumerate(line):
            if math.isfinite(value):
                color = "white" if norm(value) < 0.55 else "black"
                text = f"{value:.2g}" if value < 10 else f"{value:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=6)


def _averaged(
    values: list[float | None], errors: list[float | None]
) -> list[tuple[float, float, float]]:
    """Position, value and error of runs of positions after position 0, at most 64 of them."""
    run = max(1, -(-(len(values) - 1) // 64))
    points = []
    for start in range(1, len(values), run):
        pairs = zip(values[start : start + run], errors[start : start + run], strict=True)
        measured = [(value, error or 0.0) for value, error in pairs if value is not None]
        if measured:
            # Positions of one block are not independent, so averaging does not reduce the error.
            value, error = (sum(part) / len(measured) for part in zip(*measured, strict=True))
            points.append((start + (len(measured) - 1) / 2, value, error))
    return points
