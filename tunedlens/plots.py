"""Figures of saved results, drawn for a paper: vector and 2x raster, readable in grey."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedlens.checkpoint import write
from tunedlens.evaluation import Evaluation

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
    """KL(model || lens) of every lens, layer by layer, in nats; the band is two errors."""
    return _by_layer(evaluation, "kl_nats", "KL(model ‖ lens), nats")


def perplexity_by_layer(evaluation: Evaluation) -> "Figure":
    """Perplexity of every lens on a log scale, and the model's own as a line."""
    return _by_layer(evaluation, "perplexity", "perplexity", log=True, model_line=True)


FIGURES = {"kl_by_layer": kl_by_layer, "perplexity_by_layer": perplexity_by_layer}


def draw_evaluation(evaluation: Evaluation, folder: Path) -> dict[str, Path]:
    """Draw every figure as PNG and SVG; return the PNGs by name.

    Raises:
        InputError: the folder cannot be written.
    """
    written = {}
    for name, draw in FIGURES.items():
        figure = draw(evaluation)
        written[name] = folder / f"{name}.png"
        write(written[name], _rendered(figure, "png"))
        write(folder / f"{name}.svg", _rendered(figure, "svg"))
    return written


def _rendered(figure: "Figure", kind: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_RC):
        # Without a date, the same results give the same file.
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def _by_layer(
    evaluation: Evaluation, metric: str, label: str, log: bool = False, model_line: bool = False
) -> "Figure":
    import matplotlib
    from matplotlib.figure import Figure

    layers = list(range(evaluation.n_layers))
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        axes = figure.subplots()
        ends = []
        for index, lens in enumerate(evaluation.lenses):
            estimates = evaluation.by_layer(lens, metric)
            values = [e.value for e in estimates]
            errors = [2 * (e.standard_error or 0.0) for e in estimates]
            style = _STYLES[index % len(_STYLES)]
            axes.plot(layers, values, **style)
            low = [
                max(v - e, v / 10) if log else v - e for v, e in zip(values, errors, strict=True)
            ]
            high = [v + e for v, e in zip(values, errors, strict=True)]
            axes.fill_between(layers, low, high, color=style["color"], alpha=0.2, linewidth=0)
            ends.append((values, lens + " lens", style["color"]))
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if model_line:
            own = evaluation.of_model(metric).value
            axes.axhline(own, color="0.35", linewidth=1)
            _note(axes, f"model {own:.3g}", (0, own), "0.35", above=False)
        for values, text, color in ends:
            _label(axes, values, text, color, [v for v, *_ in ends])
        axes.set_xlabel("layer (0 is the embeddings)")
        axes.set_ylabel(label)
        axes.set_xticks(layers[:: max(1, len(layers) // 12)])
    return figure


def _label(
    axes: "Axes", values: Sequence[float], text: str, color: str, everyone: list[list[float]]
) -> None:
    """Name a line where it is farthest from the others, on its outer side."""

    def gap(layer: int) -> float:
        others = [abs(line[layer] - values[layer]) for line in everyone if line is not values]
        return min(others, default=0.0)

    layer = max(range(len(values)), key=lambda i: (gap(i), -i)) if len(everyone) > 1 else 0
    above = all(values[layer] >= line[layer] for line in everyone)
    _note(axes, text, (layer, values[layer]), color, above)


def _note(axes: "Axes", text: str, at: tuple[float, float], color: str, above: bool) -> None:
    axes.annotate(
        text,
        at,
        xytext=(6, 6 if above else -6),
        textcoords="offset points",
        color=color,
        va="bottom" if above else "top",
    )
