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
    """The effect of every target on the model against that on the lens, on log scales.

    Bars are two standard errors on either side. The title says Spearman's correlation and its
    95 % interval. Targets without any effect are left out, as a log scale has no 0.
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
                xerr=_reach(lens),
                yerr=_reach(model),
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
    return figure


def influences(bases: Mapping[str, CausalBasis]) -> "Figure":
    """The influence of every direction of some bases, by name, on a log scale.

    Bands are two standard errors on either side.
    """
    with new_figure(4.6, 3.0) as figure:
        axes = figure.subplots()
        axes.set_yscale("log")
        ends: Ends = {}
        for name, style in _styles(bases).items():
            basis = bases[name]
            pairs = zip(basis.influence_nats, basis.standard_errors, strict=True)
            estimates = [Estimate(float(value), float(error)) for value, error in pairs]
            _line(axes, list(range(1, len(estimates) + 1)), estimates, style)
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
        axes.set_xlabel("layer")
        axes.set_ylabel("stimulus-response alignment")
        name_lines(axes, ends)
    return figure


def _styles(names: Mapping[str, object]) -> dict[str, Style]:
    found = styles(list(names), {})
    return {name: found[name] for name in names}


def _line(axes: "Axes", x: Sequence[int], estimates: Sequence[Estimate], style: Style) -> None:
    values = [estimate.value for estimate in estimates]
    reaches = [_reach(estimate) or 0.0 for estimate in estimates]
    axes.plot(x, values, **style)
    low, high = ([v + sign * r for v, r in zip(values, reaches, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _reach(estimate: Estimate) -> float | None:
    """Two standard errors, if they are known."""
    error = estimate.standard_error
    return None if error is None or math.isnan(error) else 2 * error
