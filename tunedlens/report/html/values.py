"""The places of the values in a figure, so that a page can show them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict

from tunedlens.evaluation import Estimate, Evaluation
from tunedlens.metrics import METRICS
from tunedlens.model import SITES
from tunedlens.report.plots import DRAWINGS
from tunedlens.report.plots.grids import averaged, some_layers, translator_layers
from tunedlens.report.plots.style import MODEL_COLOR, styles
from tunedlens.report.tables import plus_minus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

Json = dict[str, object]
_KL = METRICS["kl_nats"].title


class Point(TypedDict):
    """What one can point at: a layer, a depth, positions or a cell of a matrix."""

    name: str
    x: float
    y: NotRequired[float]
    """Of a cell only."""
    values: list[Json]
    """The `name`, `text` and `color` of each, and where it is drawn unless that is a bar."""


def panels(name: str, figure: "Figure", evaluation: Evaluation) -> list[Json]:
    """The panels of a figure with their points.

    All places are fractions of the figure from its top left corner.

    Args:
        name: that of the figure in `plots.DRAWINGS`.
        figure: as it was drawn, with its final layout.
        evaluation: what it shows.
    """
    if name == "transfer":  # the last axes are the colour bar
        lenses = zip(figure.axes, evaluation.transfer, strict=False)
        return [_by_translator(axes, evaluation, lens) for axes, lens in lenses]
    if name == "by_position":
        layers = zip(figure.axes, some_layers(evaluation), strict=True)
        return [_by_position(axes, evaluation, layer) for axes, layer in layers]
    metrics = zip(figure.axes, DRAWINGS[name].metrics, strict=True)
    return [_by_layer(axes, evaluation, metric) for axes, metric in metrics]


def _by_layer(axes: "Axes", evaluation: Evaluation, metric: str) -> Json:
    place, line_styles = _places(axes), styles(evaluation.lenses, evaluation.sites)
    is_depth = metric == "prediction_depth"
    end = [evaluation.n_layers] if is_depth else []
    points: dict[int, Point] = {}
    for lens in evaluation.lenses:
        if is_depth and lens in evaluation.constant:
            continue
        site = SITES.index(evaluation.sites.get(lens, "resid_pre")) / 4
        layers = [*evaluation.layers_of(lens), *end]
        for layer, estimate in zip(layers, evaluation.by_layer(lens, metric), strict=True):
            name = f"{'depth' if is_depth else 'layer'} {layer}"
            point = points.setdefault(layer, Point(name=name, x=place(layer, 1)["x"], values=[]))
            value = _value(lens, estimate, line_styles[lens]["color"])
            if not axes.containers:  # bars are not marked
                value |= place(layer + (0 if is_depth else site), estimate.value)
            point["values"].append(value)
    for model in evaluation.models:
        if any((r.lens, r.metric) == (model, metric) for r in evaluation.results):
            estimate = evaluation.of_model(metric, model)
            for layer, point in points.items():
                value = _value(model, estimate, MODEL_COLOR)
                point["values"].append(value | place(layer, estimate.value))
    return _panel(axes, METRICS[metric].title, [points[layer] for layer in sorted(points)])


def _by_position(axes: "Axes", evaluation: Evaluation, layer: int) -> Json:
    place, line_styles = _places(axes), styles(evaluation.lenses, evaluation.sites)
    points: dict[float, Point] = {}
    for lens in evaluation.lenses:
        if lens not in evaluation.by_position:
            continue
        for run in averaged(evaluation.by_position[lens]["kl_nats"], layer):
            where, name = place(run.middle, run.mean[0]), f"position {run.first}"
            if run.last > run.first:
                name = f"mean of positions {run.first} to {run.last}"
            point = Point(name=name, x=where["x"], values=[])
            value = _value(lens, Estimate(*run.mean), line_styles[lens]["color"])
            points.setdefault(run.middle, point)["values"].append(value | where)
    return _panel(axes, f"{_KL}, layer {layer}", [points[at] for at in sorted(points)])


def _by_translator(axes: "Axes", evaluation: Evaluation, lens: str) -> Json:
    """The points are the cells, row by row from the bottom."""
    place, (image,) = _places(axes), axes.images
    shown = image.get_array()
    assert shown is not None
    colors = image.to_rgba(shown)
    grid, layers = evaluation.transfer[lens]["kl_nats"], translator_layers(evaluation)
    points = []
    for row, translator in enumerate(layers):
        for column, layer in enumerate(layers):
            where = place(column, row)
            found, error = grid.values[translator][layer], grid.standard_errors[translator][layer]
            values = []
            if found is not None:
                color = tuple(colors[row, column])
                values = [_value(lens, Estimate(found, error), color) | where]
            name = f"translator of layer {translator} at layer {layer}"
            points.append(Point(name=name, x=where["x"], y=where["y"], values=values))
    return _panel(axes, _KL, points) | {"columns": len(layers)}


def _panel(axes: "Axes", title: str, points: Sequence[Point]) -> Json:
    box = axes.get_position()
    return {
        "title": title,
        "box": [round(one, 4) for one in (box.x0, 1 - box.y1, box.width, box.height)],
        "points": points,
    }


def _value(name: str, estimate: Estimate, color: "ColorType") -> Json:
    from matplotlib.colors import to_hex

    return {"name": name, "text": plus_minus(estimate), "color": to_hex(color)}


def _places(axes: "Axes") -> Callable[[float, float], dict[str, float]]:
    """Turns data into places in the figure; what is off the scale is at its end."""
    low, high = axes.get_ylim()
    to_figure = axes.transData + axes.figure.transSubfigure.inverted()

    def place(x: float, y: float) -> dict[str, float]:
        left, bottom = to_figure.transform((x, min(max(y, low), high)))
        return {"x": round(left, 4), "y": round(1 - bottom, 4)}

    return place
