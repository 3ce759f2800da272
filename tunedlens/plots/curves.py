"""Tokens followed through the layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunedlens.errors import InputError
from tunedlens.plots.style import COLORS, name_lines, new_figure, plain_log_ticks
from tunedlens.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DASHES = ("-", "--", ":", "-.")
_DASH_NAMES = ("solid", "dashed", "dotted", "dash-dotted")


def curves(
    trajectory: Trajectory,
    tokens: Sequence[str | int],
    position: int = -1,
    *,
    metric: str = "probability",
) -> "Figure":
    """Probability or rank of tokens at one position through the layers, in every lens.

    A token has a colour, a lens a dash; ranks are on a log scale, 1 on top.

    Args:
        trajectory: of one text.
        tokens: as text or ids; each tracked at every position.
        position: in the text.
        metric: probability or rank.

    Raises:
        InputError: a token was not tracked, or there is no such metric or position.
    """
    if metric not in ("probability", "rank"):
        raise InputError(f"metric must be probability or rank; got {metric!r}")
    count = len(trajectory.tokens)
    if not -count <= position < count:
        raise InputError(f"position must be between {-count} and {count - 1}, got {position}")
    with new_figure(5.2, 3.2) as figure:
        axes = figure.subplots()
        ends, colors = {}, {}
        for index, token in enumerate(tokens):
            places = trajectory.tracked_places(token)
            for dash, (lens, reading) in zip(_DASHES, trajectory.readings.items(), strict=False):
                log_probs, ranks = reading.tracked(places)
                line = (ranks if metric == "rank" else log_probs.exp())[:, position].tolist()
                color = COLORS[index % len(COLORS)]
                axes.plot(range(len(line)), line, linestyle=dash, color=color)
                name = f"{token}, {lens}"
                ends[name], colors[name] = line[-2] if len(line) > 1 else line[-1], color
        names = trajectory.reading().row_names
        shown = [*range(0, len(names) - 1, max(1, len(names) // 12)), len(names) - 1]
        axes.set_xticks(shown, [names[index] for index in shown])
        drawn = zip(_DASH_NAMES, trajectory.readings, strict=False)
        axes.set_xlabel(f"layer ({', '.join(f'{dash} {lens}' for dash, lens in drawn)})")
        axes.set_ylabel(metric)
        if metric == "rank":
            axes.set_yscale("log")
            plain_log_ticks(axes)
            axes.invert_yaxis()
        else:
            axes.set_ylim(0, 1)
        name_lines(axes, ends, colors, size=8)
    return figure
