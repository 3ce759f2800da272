"""Plots of an evaluation: metrics of every lens by layer."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    from matplotlib.figure import Figure

_HATCHES = ("", "///", "...", "xxx", "\\\\\\")
_MAX_BARS = 40
"""With more layers and lenses, lines are easier to follow than bars beside each other."""
_LINE_POINTS = 11
_PANEL_POINTS = 160
"""The height of a line of text, and of the lowest panels, in points."""


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


def _heading(metric: str) -> str:
    """What a metric is in words, without a unit."""
    shown = METRICS[metric]
    return shown.heading or shown.title.partition(",")[0]


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
        line_with_band(axes, points, style, is_log=is_log)
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
            line_with_band(axes, points, line_styles[lens], is_log=False)
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


def line_with_band(
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
