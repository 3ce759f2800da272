"""The learning curve of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedlens.fit import LearningCurve
from tunedlens.report.plots.style import name_lines, new_figure, plain_log_ticks, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curve(curve: LearningCurve) -> "Figure":
    """Held-out KL of every layer against tokens, on log scales; layers are named on the right.

    What comes before the first step (the closed form, or the logit lens) is drawn at the
    left edge.
    """
    import matplotlib

    looks = curve.looks
    steps = [look for look in looks if look.tokens]
    tokens = [look.tokens for look in looks]
    tokens[0] = tokens[0] or min([look.tokens for look in steps], default=2) // 2
    n_layers = len(looks[0].kl_nats)
    lines = {str(i): [look.kl_nats[i] for look in looks] for i in range(n_layers)}
    lines["mean"] = [look.mean_kl_nats for look in looks]
    with new_figure(4.8, 3.4) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        ends, colors = {}, {}
        for name, line in lines.items():
            if name == "mean":
                style: dict[str, Any] = {"color": "black", "linestyle": "--"}
            else:
                shade = 0.9 * int(name) / max(1, n_layers - 1)
                style = {"color": matplotlib.colormaps["viridis"](shade), "marker": "."}
            axes.plot(tokens, line, **style)
            shown = f"layer {name}" if name == "0" else name
            ends[shown], colors[shown] = line[-1], style["color"]
        axes.set_xlabel(
            f"tokens in steps, {looks[-1].seconds:.0f} s in all; left edge: before the first step"
        )
        axes.set_ylabel("held-out KL(model ‖ lens), nats")
        plain_log_ticks(axes)
        name_lines(axes, ends, colors, size=8)
    return figure


def draw_learning_curve(curve: LearningCurve, folder: Path) -> None:
    """Draw it as PNG, SVG and PDF; nothing where there are not two looks to join.

    Raises:
        InputError: the folder cannot be written.
    """
    if len(curve.looks) > 1:
        save(learning_curve(curve), folder / "learning_curve")
