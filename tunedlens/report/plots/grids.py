"""Plots of what an evaluation measures on request: KL by position and by translator."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from tunedlens.evaluation import Evaluation
from tunedlens.evaluation.results import Grid
from tunedlens.metrics import METRICS
from tunedlens.report.plots.by_layer import line_with_band
from tunedlens.report.plots.style import (
    Ends,
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

_MAX_ANNOTATED_LAYERS = 16
"""With more layers, the cells of a transfer matrix are too small for numbers."""


def transfer(evaluation: Evaluation) -> "Figure":
    """KL(model ‖ lens) of every translator at every layer, on a log colour scale.

    Layers without a translator are left out.
    """
    from matplotlib.colors import LogNorm

    matrices = {lens: grids["kl_nats"].values for lens, grids in evaluation.transfer.items()}
    layers = translator_layers(evaluation)
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


def translator_layers(evaluation: Evaluation) -> list[int]:
    """The layers of the rows and of the columns of `transfer`."""
    matrices = [grids["kl_nats"].values for grids in evaluation.transfer.values()]
    layers = range(evaluation.n_layers)
    return [i for i in layers if any(matrix[i][i] is not None for matrix in matrices)]


def by_position(evaluation: Evaluation) -> "Figure":
    """KL(model ‖ lens) by position in the block, at up to four layers.

    Position 0 has a separate marker. Neighbouring positions are averaged to at most 64 points.
    """
    lenses = [lens for lens in evaluation.lenses if lens in evaluation.by_position]
    layers = some_layers(evaluation)
    line_styles = styles(evaluation.lenses, evaluation.sites)
    with new_figure(2.3 * len(layers) + 1.0, 2.8) as figure:
        panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
        ends: Ends = {}
        for axes, layer in zip(panels, layers, strict=True):
            axes.set_yscale("log")
            for lens in lenses:
                grid, style = evaluation.by_position[lens]["kl_nats"], line_styles[lens]
                runs = averaged(grid, layer)
                if points := [(run.middle, *run.mean) for run in runs if run.first > 0]:
                    line_with_band(axes, points, style | {"marker": ""}, is_log=True)
                    ends[lens] = points[-1][1], style["color"]
                if runs and runs[0].first == 0:
                    mark, first = style["marker"] or "_", runs[0].mean[0]
                    axes.plot([0], [first], color=style["color"], marker=mark)
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_xlabel("position in the block")
        panels[0].set_ylabel(METRICS["kl_nats"].title)
        for axes in panels:
            plain_log_ticks(axes.yaxis)
        name_lines(panels[-1], ends)
    return figure


def some_layers(evaluation: Evaluation) -> list[int]:
    """At most four layers, evenly spaced, which `by_position` shows."""
    layers = evaluation.layers
    return [layers[i] for i in sorted({round(i * (len(layers) - 1) / 3) for i in range(4)})]


def _write_numbers(axes: "Axes", matrix: list[list[float]], norm: "LogNorm") -> None:
    for y, line in enumerate(matrix):
        for x, value in enumerate(line):
            if math.isfinite(value):
                color = "white" if norm(value) < 0.55 else "black"
                text = f"{value:.2g}" if value < 10 else f"{value:.0f}"
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize=6)


class Run(NamedTuple):
    """Neighbouring positions, and their mean."""

    first: int
    last: int
    mean: tuple[float, float]
    """Value and standard error, which is 0 if it is not known."""

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2


def averaged(grid: Grid, layer: int) -> list[Run]:
    """Position 0 and, in at most 64 runs, the positions after it at one layer."""
    values, errors = grid.values[layer], grid.standard_errors[layer]
    size, runs = max(1, -(-(len(values) - 1) // 64)), []
    for start, end in pairwise([0, *range(1, len(values), size), len(values)]):
        pairs = zip(values[start:end], errors[start:end], strict=True)
        measured = [(value, error or 0.0) for value, error in pairs if value is not None]
        if measured:
            # Positions of one block are not independent, so averaging does not reduce the error.
            value, error = (sum(part) / len(measured) for part in zip(*measured, strict=True))
            runs.append(Run(start, start + len(measured) - 1, (value, error)))
    return runs
