"""Plots of an evaluation: every lens by layer, by position and by translator."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from tunedlens.evaluation import Evaluation
from tunedlens.metrics import METRICS
from tunedlens.model import SITES
from tunedlens.report.plots.style import (
    MODEL_COLOR,
    Ends,
    Style,
    name_lines,
    new_figure,
    plain_log_ticks,
    styles,
    ticks_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

_HATCHES = ("", "///", "...", "xxx", "\\\\\\")
_MAX_BARS = 40
"""With more layers and lenses, lines are easier to follow than bars beside each other."""
_LINE_POINTS = 11
_PANEL_POINTS = 160
"""The height of a line of text, and of the lowest panels, in points."""
_MAX_ANNOTATED_LAYERS = 16
"""With more layers, the cells of a transfer matrix are too small for numbers."""


def by_layer(
    evaluation: Evaluation,
    metrics: Sequence[str],
    *,
    rows: int = 1,
    size: tuple[float, float] = (5.0, 3.2),
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """Metrics of every lens by layer, with a line for the model if it has a value.

    Bands are two standard errors on either side. If the value of the first layer is far above all
    others, it is written at the top instead of drawn. The prediction depth is drawn as bars, or
    as lines if there would be many bars.

    Args:
        evaluation: the results.
        metrics: names of `metrics.METRICS`, one per panel.
        rows: the number of rows of panels.
        size: width and height in inches.
        limits: limits of a y-axis shared by all panels; by default each panel has its own.
    """
    with new_figure(*size) as figure:
        columns, is_shared = len(metrics) // rows, limits is not None
        panels = figure.subplots(rows, columns, squeeze=False, sharey=is_shared).ravel()
        ends = []
        for axes, metric in zip(panels, metrics, strict=True):
            draw = _draw_depths if metric == "prediction_depth" else _draw_lines
            ends.append(draw(axes, evaluation, metric))
            axes.set_ylabel(METRICS[metric].title)
            if len(metrics) > 1:
                letter = "abcdefghij"[len(ends) - 1]
                axes.set_title(f"({letter}) {_heading(metric)}", loc="left", fontsize=9)
        if limits is not None:
            panels[0].set_ylim(limits)
        for axes, named in zip(panels, ends, strict=True):
            if named:
                name_lines(axes, named)
    return figure


def transfer(evaluation: Evaluation) -> "Figure":
    """KL(model ‖ lens) of every translator at every layer, on a log colour scale.

    Layers without a translator are left out.
    """
    from matplotlib.colors import LogNorm

    matrices = {lens: grids["kl_nats"].values for lens, grids in evaluation.transfer.items()}
    rows = range(evaluation.n_layers)
    layers = [i for i in rows if any(matrix[i][i] is not None for matrix in matrices.values())]
    ticks = ticks_of(len(layers))
    names = [str(layers[tick]) for tick in ticks]
    values = [value for matrix in matrices.values() for row in matrix for value in row if value]
    norm = LogNorm(min(values), max(values))
    size = max(2.6, 0.34 * len(layers))
    with new_figure(size * len(matrices) + 1.1, size + 0.5) as figure:
        panels = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
        for axes, (lens, matrix) in zip(panels, matrices.items(), strict=True):
            parts = ([matrix[i][j] for j in layers] for i in layers)
            shown = [[math.nan if v is None else v for v in part] for part in parts]
            image = axes.imshow(shown, origin="lower", norm=norm, cmap="cividis")
            axes.set_title(f"{lens} lens", fontsize=9)
            axes.set_xlabel("applied at layer")
            axes.set_xticks(ticks, names)
            axes.set_yticks(ticks, names)
            if len(layers) <= _MAX_ANNOTATED_LAYERS:
                _write_numbers(axes, shown, norm)
        panels[0].set_ylabel("translator of layer")
        figure.colorbar(image, ax=list(panels), label=METRICS["kl_nats"].title, shrink=0.85)
    return figure


def by_position(evaluation: Evaluation) -> "Figure":
    """KL(model ‖ lens) by position in the block, at up to four layers.

    Position 0 has a separate marker. Neighbouring positions are averaged to at most 64 points.
    """
    lenses = [lens for lens in evaluation.lenses if lens in evaluation.by_position]
    scored = evaluation.layers
    layers = [scored[i] for i in sorted({round(i * (len(scored) - 1) / 3) for i in range(4)})]
    line_styles = styles(evaluation.lenses, evaluation.sites)
    with new_figure(2.3 * len(layers) + 1.0, 2.8) as figure:
        panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
        ends: Ends = {}
        for axes, layer in zip(panels, layers, strict=True):
            axes.set_yscale("log")
            for lens in lenses:
                grid, style = evaluation.by_position[lens]["kl_nats"], line_styles[lens]
                values, errors = grid.values[layer], grid.standard_errors[layer]
                if points := _averaged(values, errors):
                    _line_with_band(axes, points, style | {"marker": ""}, is_log=True)
                    ends[lens] = points[-1][1], style["color"]
                if values[0]:
                    mark = style["marker"] or "_"
                    axes.plot([0], [values[0]], color=style["color"], marker=mark)
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_xlabel("position in the block")
        panels[0].set_ylabel(METRICS["kl_nats"].title)
        for axes in panels:
            plain_log_ticks(axes.yaxis)
        name_lines(panels[-1], ends)
    return figure


def _heading(metric: str) -> str:
    """What a metric is in words, without a unit."""
    shown = METRICS[metric]
    return shown.heading or shown.title.partition(",")[0]


class Drawing(NamedTuple):
    """A plot of an evaluation."""

    caption: str
    draw: Callable[[Evaluation], "Figure"]
    has_data: Callable[[Evaluation], bool]
    metrics: Sequence[str] = ()
    """Those of its panels, if they are drawn by layer."""


def _of_metrics(
    caption: str,
    *metrics: str,
    rows: int = 1,
    size: tuple[float, float] = (5.0, 3.2),
    limits: tuple[float, float] | None = None,
) -> Drawing:
    """A drawing by `by_layer`, of an evaluation that has all the metrics."""
    draw = partial(by_layer, metrics=metrics, rows=rows, size=size, limits=limits)
    return Drawing(caption, draw, lambda evaluation: {*metrics} <= {*evaluation.metrics}, metrics)


_BAND = "Bands show two standard errors on either side."
DRAWINGS = {
    "overview": _of_metrics(
        "KL, perplexity, top-1 agreement and prediction depth of every lens. Lower is better in "
        "(a) and (b), higher in (c). At the last depth, only the model itself predicts the token. "
        "An arrow marks a value above the scale. Bands and error bars show two standard errors on "
        "either side.",
        *("kl_nats", "perplexity", "top1_agreement", "prediction_depth"),
        rows=2,
        size=(9.2, 6.2),
    ),
    "kl_by_layer": _of_metrics(
        f"KL from the model's final distribution to that of each lens (lower is closer). {_BAND}",
        "kl_nats",
    ),
    "perplexity_by_layer": _of_metrics(
        f"Perplexity of the next token (lower is better); the grey line is the model. {_BAND}",
        "perplexity",
    ),
    "bits_per_byte_by_layer": _of_metrics(
        f"Cross-entropy in bits per byte (lower is better); the grey line is the model. {_BAND}",
        "bits_per_byte",
    ),
    "bias_by_layer": _of_metrics(
        "Bias: KL from the model's mean distribution over the text to the lens's (lower is "
        f"closer). {_BAND}",
        "bias_nats",
    ),
    "agreement_by_layer": _of_metrics(
        "Fraction of tokens where the model's most probable token is the lens's most probable "
        f"one (a) or among its top ten (b); higher is closer to the model. {_BAND}",
        *("top1_agreement", "top10_agreement"),
        size=(8.6, 3.2),
        limits=(0, 1.02),
    ),
    "prediction_depth": _of_metrics(
        "Fraction of tokens by the first layer from which the most probable token no longer "
        "changes. Error bars show two standard errors on either side.",
        "prediction_depth",
    ),
    "transfer": Drawing(
        "KL when the translator of one layer is applied at another (lower is closer).",
        transfer,
        lambda evaluation: bool(evaluation.transfer),
    ),
    "by_position": Drawing(
        f"KL by position in the block; the first position has a separate marker. {_BAND}",
        by_position,
        lambda evaluation: bool(evaluation.by_position),
    ),
}
"""The plots of a report by the name of their files."""


def _draw_lines(axes: "Axes", evaluation: Evaluation, metric: str) -> Ends:
    """Draw a line with a band for every lens; returns where the lines end."""
    line_styles = styles(evaluation.lenses, evaluation.sites)
    columns = {lens: evaluation.by_layer(lens, metric) for lens in evaluation.lenses}
    is_log, top = METRICS[metric].is_log, math.inf
    if is_log:
        axes.set_yscale("log")
        top = _top_of_scale([[e.value for e in column] for column in columns.values()])
    ends: Ends = {}
    for lens, column in columns.items():
        style, first = line_styles[lens], column[0].value
        # Within a layer, sites are in the order in which the block computes them.
        offset = SITES.index(evaluation.sites.get(lens, "resid_pre")) / 4
        points = [
            (layer + offset, e.value if e.value <= top else math.nan, e.standard_error or 0.0)
            for layer, e in zip(evaluation.layers_of(lens), column, strict=True)
        ]
        _line_with_band(axes, points, style, is_log=is_log)
        if first > top:
            below = (4, -3 - 11 * len(axes.texts))  # one line under the last
            axes.annotate(f"↑ {first:.0e}", (points[0][0], top), below, color=style["color"],
                          textcoords="offset points", va="top")  # fmt: skip
        ends[lens] = column[-1].value, style["color"]
    of_models = {
        r.lens: r.value
        for r in evaluation.results
        if r.lens in evaluation.models and r.metric == metric
    }
    for model, value in of_models.items():
        axes.axhline(value, color=MODEL_COLOR, linewidth=1)
        ends[model] = value, MODEL_COLOR
    if of_models and is_log:
        axes.set_ylim(bottom=min(of_models.values()) / 1.8)
    if top < math.inf:
        axes.set_ylim(top=top)
    axes.set_xlabel("layer (0 is the embeddings)")
    axes.set_xticks(ticks_of(evaluation.n_layers))
    if is_log:
        plain_log_ticks(axes.yaxis)
    return ends


def _draw_depths(axes: "Axes", evaluation: Evaluation, metric: str) -> Ends:
    """Draw fractions of tokens by prediction depth as bars, or as lines if there would be many.

    Lenses with bars are named in a corner. Returns where the lines end.
    """
    lenses = [lens for lens in evaluation.lenses if lens not in evaluation.constant]
    line_styles = styles(evaluation.lenses, evaluation.sites)
    axes.set_xlabel("prediction depth, layers")
    axes.set_xticks(ticks_of(evaluation.n_layers + 1))
    width, ends = 0.8 / max(1, len(lenses)), {}
    for index, lens in enumerate(lenses):
        column, color = evaluation.by_layer(lens, metric), line_styles[lens]["color"]
        mean = evaluation.of_lens(lens, "mean_prediction_depth").value
        name = f"{lens}, mean {mean:.1f}"
        depths = [*evaluation.layers_of(lens), evaluation.n_layers]
        if len(lenses) * len(column) > _MAX_BARS:
            pairs = zip(depths, column, strict=True)
            points = [(depth, e.value, e.standard_error or 0.0) for depth, e in pairs]
            _line_with_band(axes, points, line_styles[lens], is_log=False)
            ends[name] = column[-1].value, color
            continue
        shift = (index - (len(lenses) - 1) / 2) * width
        axes.bar(
            [depth + shift for depth in depths],
            [e.value for e in column],
            width,
            yerr=[2 * (e.standard_error or 0.0) for e in column],
            error_kw={"elinewidth": 0.8},
            color=color,
            hatch=_HATCHES[index % len(_HATCHES)],
            edgecolor="white",
            linewidth=0,
        )
        axes.annotate(name, (0, 1), (8, -4 - _LINE_POINTS * index), xycoords="axes fraction",
                      textcoords="offset points", va="top", color=color, fontsize=8.5)  # fmt: skip
    # The names stand above all bars.
    names = 0.0 if ends else min((_LINE_POINTS * len(lenses) + 8) / _PANEL_POINTS, 0.6)
    axes.set_ylim(0, axes.get_ylim()[1] / (1 - names))
    return ends


def _line_with_band(
    axes: "Axes", points: Sequence[tuple[float, float, float]], style: Style, *, is_log: bool
) -> None:
    """Draw positions, values and errors as a line with a band of two standard errors.

    On a log scale, the band does not go below a tenth of the line.
    """
    x, y, _ = zip(*points, strict=True)
    axes.plot(x, y, **style, markevery=ticks_of(len(points)).step)
    low = [max(v - 2 * e, v / 10 if is_log else -math.inf) for _, v, e in points]
    high = [v + 2 * e for _, v, e in points]
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _top_of_scale(values: list[list[float]]) -> float:
    """A limit below the first layer if its value is over 50 times all others; else infinity."""
    rest = max((value for line in values for value in line[1:]), default=0.0)
    if not rest or max(line[0] for line in values) <= 50 * rest:
        return math.inf
    return 2 * max(value for line in values for value in line if value <= 50 * rest)


def _write_numbers(axes: "Axes", matrix: list[list[float]], norm: "LogNorm") -> None:
    for y, line in enumerate(matrix):
        for x, value in enumerate(line):
            if math.isfinite(value):
                color = "white" if norm(value) < 0.55 else "black"
                text = f"{value:.2g}" if value < 10 else f"{value:.0f}"
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize=6)


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
