"""Tokens followed through the layers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunedlens.errors import InputError
from tunedlens.report.plots.style import COLORS, drawable, name_lines, new_figure, plain_log_ticks
from tunedlens.trajectories import Trajectory, single_ids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TOKENS = 5
_DASHES = ("-", "--", ":", "-.")
_DASH_NAMES = ("solid", "dashed", "dotted", "dash-dotted")


def curves(
    trajectory: Trajectory,
    tokens: str | int | Sequence[str | int] | None = None,
    position: int = -1,
    *,
    metric: str = "probability",
) -> "Figure":
    """Probability or rank of tokens at one position through the layers, in every lens.

    A token has a colour, named where all lenses are the model; a lens has a dash. Ranks are on a
    log scale, 1 on top.

    Args:
        trajectory: of one text.
        tokens: as text or ids; by default those tracked at the position that the model itself
            finds most probable, at most 5.
        position: among those that are read.
        metric: probability or rank.

    Raises:
        InputError: a token was not tracked, or there is no such metric or position.
    """
    if metric not in ("probability", "rank"):
        raise InputError(f"metric must be probability or rank; got {metric!r}")
    place = trajectory.place(position)
    if tokens is None:
        followed = trajectory.tracked_ids[place].tolist()
        probs = trajectory.reading().tracked_log_probs[-1, place].tolist()
        ranked = sorted(zip(probs, followed, strict=True), reverse=True)
        tokens = [token for _, token in ranked if token >= 0][:_MOST_TOKENS]
    ids = single_ids(trajectory.model, tokens)
    if not ids:
        raise InputError("there is no token to follow; give at least one")
    if len(trajectory.readings) > len(_DASHES):
        raise InputError(
            f"{len(trajectory.readings)} lenses are too many to tell apart by their dashes; read "
            f"the text with at most {len(_DASHES)}"
        )
    with new_figure(5.2, 3.2, has_tokens=True) as figure:
        axes = figure.subplots()
        ends, colors = {}, {}
        for index, token in enumerate(ids):
            word = drawable(trajectory.shown(token))
            for dash, lens in zip(_DASHES, trajectory.readings, strict=False):
                line = trajectory.figures(metric, lens, of=token)[:, place].tolist()
                if math.isnan(line[0]):
                    raise InputError(
                        f"{word} was not tracked at position {position}; give it as `track` to "
                        "trajectory"
                    )
                color = COLORS[index % len(COLORS)]
                axes.plot(range(len(line)), line, linestyle=dash, color=color)
            ends[word], colors[word] = line[-1], color  # where all lenses are the model
        names = trajectory.row_names
        ticks = [*range(0, len(names) - 1, max(1, len(names) // 12)), len(names) - 1]
        axes.set_xticks(ticks, [names[index] for index in ticks])
        drawn = zip(_DASH_NAMES, trajectory.readings, strict=False)
        axes.set_xlabel(f"layer ({', '.join(f'{dash} {lens}' for dash, lens in drawn)})")
        after = drawable(trajectory.shown(int(trajectory.input_ids[place])))
        axes.set_ylabel(f"{metric} after {after} (position {trajectory.positions[place]})")
        if metric == "rank":
            axes.set_yscale("log")
            plain_log_ticks(axes)
            axes.invert_yaxis()
        else:
            axes.set_ylim(0, None)
        name_lines(axes, ends, colors, size=8)
    return figure
