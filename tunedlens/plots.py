"""Figures of saved results, drawn for a paper: vector and 2x raster, readable in grey."""

import io
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedlens.checkpoint import write
from tunedlens.evaluation import Evaluation
from tunedlens.fit import LearningCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which most colour-blind readers can tell apart; each lens also
# has its own marker and dash, so that grey is enough.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
)
_RC: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "tunedlens",
}


def kl_by_layer(evaluation: Evaluation) -> "Figure":
    """KL(model ‖ lens) of every lens by layer, in nats on a log scale.

    Bands are two standard errors to either side.
    """
    return _by_layer(evaluation, "kl_nats", "KL(model ‖ lens), nats")


def perplexity_by_layer(evaluation: Evaluation) -> "Figure":
    """Perplexity of every lens by layer on a log scale, and the model's own as a line.

    Bands are two standard errors to either side.
    """
    return _by_layer(evaluation, "perplexity", "perplexity", model_line=True)


FIGURES = {"kl_by_layer": kl_by_layer, "perplexity_by_layer": perplexity_by_layer}


def learning_curve(curve: LearningCurve) -> "Figure":
    """Held-out KL of every layer against tokens, on log scales; layers are named on the right.

    What comes before the first step (the closed form, or the logit lens) is drawn at the
    left edge.
    """
    import matplotlib
    from matplotlib.figure import Figure

    looks = curve.looks
    steps = [look for look in looks if look.tokens]
    tokens = [look.tokens for look in looks]
    tokens[0] = tokens[0] or min([look.tokens for look in steps], default=2) // 2
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        colors = matplotlib.colormaps["viridis"]
        n_layers = len(looks[0].kl_nats)
        lines = {str(i): [look.kl_nats[i] for look in looks] for i in range(n_layers)}
        lines["mean"] = [look.mean_kl_nats for look in looks]
        heights = _spread([math.log(line[-1]) for line in lines.values()])
        for (name, line), height in zip(lines.items(), heights, strict=True):
            if name == "mean":
                style: dict[str, Any] = {"color": "black", "linestyle": "--"}
            else:
                color = colors(0.9 * int(name) / max(1, n_layers - 1))
                style = {"color": color, "marker": "."}
            axes.plot(tokens, line, **style)
            shown = f"layer {name}" if name == "0" else name
            _note_beside(axes, shown, (tokens[-1], math.exp(height)), style["color"])
        axes.set_xlabel(f"tokens of steps, from the start at the left ({looks[-1].seconds:.0f} s)")
        axes.set_ylabel("held-out KL(model ‖ lens), nats")
        _plain_ticks(axes)
    return figure


def draw_learning_curve(curve: LearningCurve, folder: Path) -> None:
    """Draw it as PNG and SVG; nothing where there are not two looks to join.

    Raises:
        InputError: the folder cannot be written.
    """
    if len(curve.looks) > 1:
        _save(learning_curve(curve), folder / "learning_curve")


def draw_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Draw every figure as PNG and SVG.

    Raises:
        InputError: the folder cannot be written.
    """
    for name, draw in FIGURES.items():
        _save(draw(evaluation), folder / name)


def _save(figure: "Figure", path: Path) -> None:
    for kind in ("png", "svg"):
        write(path.with_name(f"{path.name}.{kind}"), _rendered(figure, kind))


def _rendered(figure: "Figure", kind: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_RC):
        # Without a date, the same results give the same file.
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def _by_layer(
    evaluation: Evaluation, metric: str, label: str, model_line: bool = False
) -> "Figure":
    import matplotlib
    from matplotlib.figure import Figure

    layers = list(range(evaluation.n_layers))
    columns = [evaluation.by_layer(lens, metric) for lens in evaluation.lenses]
    values = [[estimate.value for estimate in column] for column in columns]
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log")
        top = _top_of_the_scale(values)
        for column, line, style in zip(columns, values, itertools.cycle(_STYLES), strict=False):
            shown = [value if value <= top else math.nan for value in line]
            errors = [2 * (estimate.standard_error or 0.0) for estimate in column]
            low = [max(v - e, v / 10) for v, e in zip(shown, errors, strict=True)]
            high = [v + e for v, e in zip(shown, errors, strict=True)]
            axes.plot(layers, shown, **style)
            axes.fill_between(layers, low, high, color=style["color"], alpha=0.2, linewidth=0)
            if line[0] > top:
                _note(axes, f"↑ {line[0]:.0e}", (0, top), style["color"], above=False)
        if top < math.inf:
            axes.set_ylim(top=top)
        for name, line, style in zip(
            evaluation.lenses, values, itertools.cycle(_STYLES), strict=False
        ):
            _name_line(axes, f"{name} lens", line, values, style["color"])
        if model_line:
            own = evaluation.of_model(metric).value
            axes.axhline(own, color="0.35", linewidth=1)
            axes.set_ylim(bottom=own / 1.8)
            _note(axes, f"model {own:.3g}", (0, own), "0.35", above=False)
        axes.set_xlabel("layer (0 is the embeddings)")
        axes.set_ylabel(label)
        axes.set_xticks(layers[:: max(1, len(layers) // 12)])
        _plain_ticks(axes)
    return figure


def _top_of_the_scale(values: list[list[float]]) -> float:
    """Infinite, or short of a first layer that is 50 times above all the others."""
    rest = max((value for line in values for value in line[1:]), default=0.0)
    if not rest or max(line[0] for line in values) <= 50 * rest:
        return math.inf
    return 2 * max(value for line in values for value in line if value <= 50 * rest)


def _plain_ticks(axes: "Axes") -> None:
    """Numbers as a reader would say them; 1, 2, 5 where the axis spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    few = high / low < 1000
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _name_line(
    axes: "Axes", name: str, line: list[float], everyone: list[list[float]], color: str
) -> None:
    """Write a line's name where it is farthest from the others, on its outer side."""

    def distance(layer: int) -> float:
        others = [other[layer] for other in everyone if other is not line]
        return min((abs(math.log(line[layer] / value)) for value in others), default=0.0)

    inner = range(len(line) // 3, max(1, len(line) - 1))
    layer = max(inner, key=distance)
    above = line[layer] >= max(other[layer] for other in everyone)
    _note(axes, name, (layer, line[layer]), color, above)


def _note(axes: "Axes", text: str, at: tuple[float, float], color: str, above: bool) -> None:
    """Text above and to the right of a point, or below it and, past the axis, to the left."""
    to_the_right = above or at[0] == 0
    axes.annotate(
        text,
        at,
        xytext=(5 if to_the_right else -5, 5 if above else -5),
        textcoords="offset points",
        color=color,
        ha="left" if to_the_right else "right",
        va="bottom" if above else "top",
    )


def _spread(heights: list[float]) -> list[float]:
    """Falling heights, moved apart where names beside them would touch."""
    gap = 0.05 * (max(heights) - min(heights))
    order = sorted(range(len(heights)), key=lambda index: -heights[index])
    placed = list(heights)
    for above, below in itertools.pairwise(order):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed


def _note_beside(axes: "Axes", text: str, at: tuple[float, float], color: Any) -> None:
    """Text to the right of a point."""
    axes.annotate(
        text, at, xytext=(6, 0), textcoords="offset points", color=color, va="center", fontsize=8
    )
