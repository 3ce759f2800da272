"""Plots of ablations: effects on a lens and on the model, causal bases, alignment by layer."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tunedlens.causal import Alignment, CausalBasis, CausalEffects
from tunedlens.evaluation import Estimate
from tunedlens.report.plots.style import (
    COLORS,
    Ends,
    Style,
    name_lines,
    new_figure,
    plain_log_ticks,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def effects_scatter(effects: CausalEffects) -> "Figure":
    """The effect of every target on the model against its effect on the lens, on log scales.

    Bars are two standard errors of the logarithm on either side. The title shows Spearman's
    correlation and its 95 % interval. Targets without any effect are left out.
    """
    pairs = [
        pair
        for pair in zip(effects.lens_nats, effects.model_nats, strict=True)
        if min(estimate.value for estimate in pair) > 0
    ]
    with new_figure(3.8, 3.4) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        for lens, model in pairs:
            axes.errorbar(
                lens.value,
                model.value,
                xerr=_log_bar(lens),
                yerr=_log_bar(model),
                marker="o",
                markersize=3.5,
                color=COLORS[0],
                elinewidth=0.6,
            )
        if len(effects.targets) > 3:
            value, low, high = effects.spearman()
            axes.set_title(f"Spearman's ρ = {value:.2f} ({low:.2f} to {high:.2f})", fontsize=9)
        axes.set_xlabel("KL(lens ‖ lens under ablation), nats")
        axes.set_ylabel("KL(model ‖ model under ablation), nats")
        plain_log_ticks(axes.xaxis)
        plain_log_ticks(axes.yaxis)
    return figure


def influences(bases: Mapping[str, CausalBasis]) -> "Figure":
    """The influence of every direction of several bases, on a log scale.

    Bands are two standard errors of the logarithm on either side.
    """
    with new_figure(4.6, 3.0) as figure:
        axes = figure.subplots()
        axes.set_yscale("log")
        ends: Ends = {}
        for name, style in _styles(bases).items():
            basis = bases[name]
            pairs = zip(basis.influence_nats, basis.standard_errors, strict=True)
            estimates = [Estimate(float(value), float(error)) for value, error in pairs]
            _line(axes, list(range(1, len(estimates) + 1)), estimates, style, is_log=True)
            ends[name] = estimates[-1].value, style["color"]
        axes.set_xlabel("direction")
        axes.set_ylabel("KL(lens ‖ lens under ablation), nats")
        plain_log_ticks(axes.yaxis)
        name_lines(axes, ends)
    return figure


def alignment_by_layer(alignments: Sequence[Alignment]) -> "Figure":
    """Stimulus-response alignment of every lens by layer.

    Bands are two standard errors on either side.
    """
    with new_figure(4.6, 3.0) as figure:
        axes = figure.subplots()
        ends: Ends = {}
        for name, style in _styles({one.lens: one for one in alignments}).items():
            own = sorted((one.layer, one.similarity) for one in alignments if one.lens == name)
            _line(axes, [layer for layer, _ in own], [value for _, value in own], style)
            ends[name] = own[-1][1].value, style["color"]
        axes.locator_params("x", integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("stimulus-response alignment")
        name_lines(axes, ends)
    return figure


def _styles(names: Mapping[str, object]) -> dict[str, Style]:
    found = styles(list(names), {})
    return {name: found[name] for name in names}


def _line(
    axes: "Axes",
    x: Sequence[int],
    estimates: Sequence[Estimate],
    style: Style,
    *,
    is_log: bool = False,
) -> None:
    ranges = [_range(estimate, is_log) for estimate in estimates]
    low, high = zip(*ranges, strict=True)
    axes.plot(x, [estimate.value for estimate in estimates], **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _log_bar(estimate: Estimate) -> list[list[float]]:
    """How far a bar reaches down and up on a log scale."""
    low, high = _range(estimate, is_log=True)
    return [[estimate.value - low], [high - estimate.value]]


def _range(estimate: Estimate, is_log: bool) -> tuple[float, float]:
    """Two standard errors on either side, or the value alone if they are not known."""
    value, error = estimate
    reach = 0.0 if error is None or math.isnan(error) else 2 * error
    if is_log:
        factor = math.exp(reach / value)
        return value / factor, value * factor
    return value - reach, value + reach
