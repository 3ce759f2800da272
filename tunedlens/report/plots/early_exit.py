"""Curves of the cost of early exits against the layers that they save."""

from typing import TYPE_CHECKING

from tunedlens.early_exit import EarlyExits, ExitPoint
from tunedlens.report.plots.style import MODEL_COLOR, new_figure, plain_log_ticks, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "entropy": "exit below an entropy",
    "confidence": "exit above a probability",
    "agreement": "exit when layers agree",
}
_LEAST_AGREEMENT = 0.5
"""Agreement below it is not drawn."""
_LARGEST_RATIO = 4
"""Perplexity is drawn up to this multiple of the model's."""


def exit_curves(exits: EarlyExits) -> "Figure":
    """Agreement and perplexity against layers saved, with a panel for every signal.

    All points are measured on the half of the text where thresholds are tested. Bars are two
    standard errors on either side; those of the perplexity are paired with the model's.
    """
    style = styles(list(exits.curves), {})
    with new_figure(8.4, 4.8) as figure:
        panels = figure.subplots(2, len(_TITLES), sharex=True, sharey="row")
        panels[0, 0].set_ylim(_LEAST_AGREEMENT, 1.01)
        panels[1, 0].set_yscale("log")
        panels[1, 0].set_ylim(0.95, _LARGEST_RATIO)
        for column, (signal, title) in enumerate(_TITLES.items()):
            top, bottom = panels[:, column]
            for lens, curves in exits.curves.items():
                points = curves[signal].second_half  # type: ignore[index]
                _draw(top, points, "agreement", {**style[lens], "label": lens})
                _draw(bottom, points, "perplexity_ratio", style[lens])
            bottom.axhline(1, color=MODEL_COLOR, linestyle=":")
            top.set_title(title, fontsize=9)
            bottom.set_xlabel(f"mean layers saved, of {exits.n_layers}")
        panels[0, 0].set_ylabel("agreement with the model")
        panels[1, 0].set_ylabel("perplexity, relative to the model's")
        plain_log_ticks(panels[1, 0].yaxis)
        panels[0, -1].legend(frameon=False, loc="upper right")
    return figure


def _draw(axes: "Axes", points: list[ExitPoint], cost: str, style: dict[str, object]) -> None:
    saved = [point.layers_saved.value for point in points]
    costs = [getattr(point, cost) for point in points]
    low, high = axes.get_ylim()
    errors = [2 * (one.standard_error or 0.0) if low <= one.value <= high else 0.0 for one in costs]
    look = style | {"markersize": 2.5, "linewidth": 1.2, "elinewidth": 0.6}
    axes.errorbar(saved, [one.value for one in costs], errors, **look)  # type: ignore[arg-type]
