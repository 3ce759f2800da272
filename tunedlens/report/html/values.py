"""The places of the values in a figure, so that a page can show them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunedlens.evaluation import Evaluation
from tunedlens.metrics import METRICS
from tunedlens.model import SITES
from tunedlens.report.plots.style import MODEL_COLOR, styles
from tunedlens.report.tables import plus_minus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = dict[str, object]


def panels(figure: "Figure", evaluation: Evaluation, metrics: Sequence[str]) -> list[Json]:
    """The panels of a figure by layer, and in them the values of every lens.

    All places are fractions of the figure from its top left corner.

    Args:
        figure: drawn by `plots.by_layer`, with its final layout.
        evaluation: what it shows.
        metrics: those of its panels.
    """
    return [
        _panel(axes, evaluation, metric) for axes, metric in zip(figure.axes, metrics, strict=True)
    ]


def _panel(axes: "Axes", evaluation: Evaluation, metric: str) -> Json:
    from matplotlib.colors import to_hex

    low, high = axes.get_ylim()
    to_figure = axes.transData + axes.figure.transSubfigure.inverted()

    def place(x: float, y: float) -> tuple[float, float]:
        left, bottom = to_figure.transform((x, min(max(y, low), high)))
        return round(left, 4), round(1 - bottom, 4)

    line_styles = styles(evaluation.lenses, evaluation.sites)
    is_depth = metric == "prediction_depth"
    end = [evaluation.n_layers] if is_depth else []
    values: dict[int, list[Json]] = {}
    for lens in evaluation.lenses:
        if is_depth and lens in evaluation.constant:
            continue
        site = SITES.index(evaluation.sites.get(lens, "resid_pre")) / 4
        column = zip(
            [*evaluation.layers_of(lens), *end], evaluation.by_layer(lens, metric), strict=True
        )
        for layer, estimate in column:
            value: Json = {"name": lens, "text": plus_minus(estimate)}
            value["color"] = to_hex(line_styles[lens]["color"])
            if not axes.containers:  # bars are not marked
                value["x"], value["y"] = place(layer + (0 if is_depth else site), estimate.value)
            values.setdefault(layer, []).append(value)
    models = [r for r in evaluation.results if r.lens in evaluation.models and r.metric == metric]
    box = axes.get_position()
    return {
        "title": METRICS[metric].title,
        "box": [round(one, 4) for one in (box.x0, 1 - box.y1, box.width, box.height)],
        "layers": [
            {
                "name": f"{'depth' if is_depth else 'layer'} {layer}",
                "x": place(layer, high)[0],
                "values": values[layer]
                + [
                    {
                        "name": model.lens,
                        "text": plus_minus(evaluation.of_model(metric, model.lens)),
                        "color": to_hex(MODEL_COLOR),
                        "x": place(layer, high)[0],
                        "y": place(layer, model.value)[1],
                    }
                    for model in models
                ],
            }
            for layer in sorted(values)
        ],
    }
