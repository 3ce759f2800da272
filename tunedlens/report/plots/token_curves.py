"""Tokens followed through the layers."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunedlens.errors import InputError
from tunedlens.report.plots.style import COLORS, drawable, name_lines, new_figure, plain_log_ticks
from tunedlens.trajectories import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_TOKENS = 5
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

    Every token has a colour and every lens a dash. Ranks are on a log scale with 1 on top.

    Args:
        tokens: tracked tokens as text or ids; by default the at most 5 tracked tokens that the
            model itself finds most probable.
        position: an index within the trajectory.
        metric: probability or rank.

    Raises:
        InputError: a token was not tracked, or there is no such metric or position.
    """
    if metric not in ("probability", "rank"):
        raise InputError(f"metric must be probability or rank; got {metric!r}")
    index = trajectory.position_index(position)
    ids = _most_probable(trajectory, index) if tokens is None else trajectory.token_ids(tokens)
    lenses = _distinguishable_lenses(trajectory)
    with new_figure(5.2, 3.2, has_tokens=True) as figure:
        axes = figure.subplots()
        ends, colors = {}, {}
        for token, color in zip(ids, itertools.cycle(COLORS), strict=False):
            word = drawable(trajectory.vocabulary[token].shown)
            for dash, lens in zip(_DASHES, lenses, strict=False):
                line = trajectory.values(metric, lens, token=token)[:, index].tolist()
                if math.isnan(line[0]):
                    raise InputError(
                        f"{word} was not tracked at position {position}; give it as `track` to "
                        "trajectory"
                    )
                axes.plot(range(len(line)), line, linestyle=dash, color=color)
            ends[word], colors[word] = line[-1], color  # every lens equals the model there
        _name_layers(axes, trajectory.row_names)
        dashes = ", ".join(f"{d} {lens}" for d, lens in zip(_DASH_NAMES, lenses, strict=False))
        axes.set_xlabel(f"layer ({dashes})")
        after = drawable(trajectory.vocabulary[int(trajectory.input_ids[index])].shown)
        axes.set_ylabel(f"{metric} after {after} (position {trajectory.positions[index]})")
        if metric == "rank":
            axes.set_yscale("log")
            plain_log_ticks(axes)
            axes.invert_yaxis()
        else:
            axes.set_ylim(0, None)
        name_lines(axes, ends, colors, size=8)
    return figure


def _distinguishable_lenses(trajectory: Trajectory) -> list[str]:
    lenses = list(trajectory.predictions)
    if len(lenses) > len(_DASHES):
        raise InputError(
            f"{len(lenses)} lenses are too many to tell apart by their dashes; read the text "
            f"with at most {len(_DASHES)}"
        )
    return lenses


def _name_layers(axes: "Axes", names: list[str]) -> None:
    """Name at most about 12 of the rows on the x-axis, and the last one."""
    ticks = [*range(0, len(names) - 1, max(1, len(names) // 12)), len(names) - 1]
    axes.set_xticks(ticks, [names[tick] for tick in ticks])


def _most_probable(trajectory: Trajectory, index: int) -> list[int]:
    """The tracked tokens that the model finds most probable."""
    model = next(iter(trajectory.predictions.values()))
    log_probs = model.tracked_log_probs[-1, index].tolist()
    ranked = sorted(
        zip(log_probs, trajectory.tracked_ids[index].tolist(), strict=True), reverse=True
    )
    return [token for _, token in ranked if token >= 0][:_MAX_TOKENS]
