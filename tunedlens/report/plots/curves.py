"""Curves of a run through its validations, and of tokens through the layers."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunedlens.errors import InputError
from tunedlens.fit import ValidationResult
from tunedlens.model import HookPoint, hook_points
from tunedlens.report.plots.style import (
    COLORS,
    Ends,
    drawable,
    name_lines,
    new_figure,
    plain_log_ticks,
    save,
    short_count,
    ticks_of,
)
from tunedlens.trajectories import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_TOKENS = 5
_DASHES = {"solid": "-", "dashed": "--", "dotted": ":", "dash-dotted": "-."}
MAX_LENSES = len(_DASHES)


def learning_curve(
    history: Sequence[ValidationResult], points: Sequence[HookPoint] | None = None
) -> "Figure":
    """Held-out KL of every layer against tokens, on log scales.

    The validation before the first step (of the closed form or the logit lens) is at 0. If there
    are many layers, only some are named.

    Args:
        history: the validations of a run.
        points: the sites and layers of the translators, with a panel for every site; by default
            all layers of the stream.
    """
    import matplotlib

    tokens = [result.tokens for result in history]
    first = min((count for count in tokens if count), default=1)
    ticks = [0, *tokens[:0:-3][::-1]]
    n_points = len(history[0].kl_nats)
    points = hook_points(["resid_pre"], range(n_points)) if points is None else points
    sites, last = list(dict.fromkeys(site for site, _ in points)), max(layer for _, layer in points)
    columns = min(2, len(sites))
    rows = -(-len(sites) // columns)
    with new_figure(4.8 * columns, 3.4 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        named: list[tuple[Axes, Ends]] = []
        for site, axes in zip(sites, grid.flat, strict=False):
            axes.set_xscale("symlog", linthresh=first, linscale=0.5)  # it has room for 0
            axes.set_yscale("log")
            ends: Ends = {}
            of_site = [index for index, point in enumerate(points) if point.site == site]
            own = [[result.kl_nats[index] for index in of_site] for result in history]
            for order, line in enumerate(zip(*own, strict=True)):
                layer = points[of_site[order]].layer
                color = matplotlib.colormaps["viridis"](0.9 * layer / max(1, last))
                axes.plot(tokens, line, color=color, marker=".")
                if order in ticks_of(len(of_site)) or order == len(of_site) - 1:
                    ends[str(layer) if ends else f"layer {layer}"] = line[-1], color
            mean = [sum(values) / len(values) for values in own]
            axes.plot(tokens, mean, color="black", linestyle="--")
            ends["mean"] = mean[-1], "black"
            if len(sites) > 1:
                axes.set_title(site, fontsize=9)
            axes.set_xlabel(f"tokens in steps ({history[-1].seconds:.0f} s in all)")
            axes.set_xticks(ticks, [short_count(count) for count in ticks])
            axes.set_xticks([], minor=True)
            named.append((axes, ends))
        for unused in grid.flat[len(sites) :]:
            unused.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel("held-out KL(model ‖ lens), nats")
        for axes, ends in named:
            plain_log_ticks(axes.yaxis)
            name_lines(axes, ends, size=8)
    return figure


def draw_learning_curve(
    history: Sequence[ValidationResult], folder: Path, points: Sequence[HookPoint] | None = None
) -> None:
    """Draw the learning curve as PNG, SVG and PDF, if there are at least two validations."""
    if len(history) > 1:
        save(learning_curve(history, points), folder / "learning_curve")


def curves(
    trajectory: Trajectory,
    tokens: str | int | Sequence[str | int] | None = None,
    position: int = -1,
    *,
    metric: str = "probability",
) -> "Figure":
    """Plot the probability or rank of tokens at one position by layer, in every lens.

    Colours distinguish tokens, and line styles distinguish lenses. Ranks are on a log scale with
    1 at the top.

    Args:
        tokens: tracked tokens as text or ids; by default the (at most 5) tracked tokens with the
            highest probability in the model.
        position: an index within the trajectory.
        metric: `probability` or `rank`.

    Raises:
        InputError: a token was not tracked, or there is no such metric or position.
    """
    if metric not in ("probability", "rank"):
        raise InputError(f"metric must be probability or rank; got {metric!r}")
    index, lenses = trajectory.position_index(position), list(trajectory.predictions)
    ids = most_probable(trajectory, index) if tokens is None else trajectory.token_ids(tokens)
    if len(lenses) > MAX_LENSES:
        raise InputError(
            f"{len(lenses)} lenses are too many to distinguish by line styles; read the text with "
            f"at most {MAX_LENSES}"
        )
    with new_figure(5.2, 3.2, has_tokens=True) as figure:
        axes = figure.subplots()
        ends: Ends = {}
        for token, color in zip(ids, itertools.cycle(COLORS), strict=False):
            word = drawable(trajectory.vocabulary[token].shown)
            for dash, lens in zip(_DASHES.values(), lenses, strict=False):
                line = trajectory.values(metric, lens, token=token)[:, index].tolist()
                if math.isnan(line[0]):
                    raise InputError(
                        f"{word} was not tracked at position {position}; pass it as `track` to "
                        "`trajectory`"
                    )
                axes.plot(range(len(line)), line, linestyle=dash, color=color)
            ends[word] = line[-1], color  # every lens equals the model there
        names, last = trajectory.row_names, len(trajectory.rows) - 1
        layers = range(0, last, max(1, len(names) // 12))
        ticks = [*(layer for layer in layers if last - layer >= last / 12), last]  # "model" is wide
        axes.set_xticks(ticks, [names[tick] for tick in ticks])
        dashes = ", ".join(f"{dash} {lens}" for dash, lens in zip(_DASHES, lenses, strict=False))
        axes.set_xlabel(f"layer ({dashes})")
        after = drawable(trajectory.vocabulary[int(trajectory.input_ids[index])].shown)
        axes.set_ylabel(f"{metric} after {after} (position {trajectory.positions[index]})")
        if metric == "rank":
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
            axes.invert_yaxis()
        else:
            axes.set_ylim(0, None)
        name_lines(axes, ends, size=8)
    return figure


def most_probable(trajectory: Trajectory, index: int) -> list[int]:
    """The (at most 5) tracked tokens with the highest probability in the model."""
    model = next(iter(trajectory.predictions.values()))
    log_probs = model.tracked_log_probs[-1, index].tolist()
    pairs = zip(log_probs, trajectory.tracked_ids[index].tolist(), strict=True)
    return [token for _, token in sorted(pairs, reverse=True) if token >= 0][:_MAX_TOKENS]
