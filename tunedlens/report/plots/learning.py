"""The learning curve of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunedlens.fit import ValidationResult
from tunedlens.report.plots.style import name_lines, new_figure, plain_log_ticks, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curve(history: Sequence[ValidationResult]) -> "Figure":
    """Held-out KL of every layer against tokens, on log scales; layers are named on the right.

    The validation before the first step (the closed form, or the logit lens) is drawn at the
    left edge.
    """
    import matplotlib

    tokens = [result.tokens for result in history]
    tokens[0] = tokens[0] or min((count for count in tokens if count), default=2) // 2
    n_layers = len(history[0].kl_nats)
    colors = [
        matplotlib.colormaps["viridis"](0.9 * i / max(1, n_layers - 1)) for i in range(n_layers)
    ]
    with new_figure(4.8, 3.4) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        ends: dict[str, float] = {}
        end_colors: dict[str, object] = {}
        for layer, color in enumerate(colors):
            line = [result.kl_nats[layer] for result in history]
            axes.plot(tokens, line, color=color, marker=".")
            label = "layer 0" if layer == 0 else str(layer)
            ends[label], end_colors[label] = line[-1], color
        mean = [result.mean_kl_nats for result in history]
        axes.plot(tokens, mean, color="black", linestyle="--")
        ends["mean"], end_colors["mean"] = mean[-1], "black"
        axes.set_xlabel(
            f"tokens in steps, {history[-1].seconds:.0f} s in all; left edge: before the first step"
        )
        axes.set_ylabel("held-out KL(model ‖ lens), nats")
        plain_log_ticks(axes)
        name_lines(axes, ends, end_colors, size=8)
    return figure


def draw_learning_curve(history: Sequence[ValidationResult], folder: Path) -> None:
    """Draw it as PNG, SVG and PDF, if there are at least two validations.

    Raises:
        InputError: the folder cannot be written.
    """
    if len(history) > 1:
        save(learning_curve(history), folder / "learning_curve")
