"""Colour scales of heatmaps: one definition for figures and for the interactive page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import DIVERGENCES, TRAJECTORY_METRICS
from tunedlens.trajectories import Trajectory

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

COLOR_MAPS = ("cividis", "cividis_r", "RdBu")
MISSING = "#d9d9d9"
"""The colour of a cell without a value."""
Scale = Literal["linear", "sqrt", "log", "asinh"]
_READABLE = 0.179
"""Above this luminance, black letters have more contrast than white ones."""


@dataclass(frozen=True)
class ColorScale:
    """The mapping of values to colours."""

    low: float
    high: float
    scale: Scale
    """`asinh` is logarithmic on both sides of 0."""
    color_map: str
    """One of `COLOR_MAPS`, or any map of matplotlib in a figure."""

    @classmethod
    def from_values(
        cls,
        metric: str,
        values: Sequence[tuple[Trajectory, Float[Tensor, "rows positions"]]],
        *,
        is_difference: bool = False,
    ) -> "ColorScale":
        """The scale of a metric for the values of several texts or lenses.

        Position 0 of a text does not influence the limits, because it is unlike all others, and
        neither do outliers by Tukey's rule: values on the scale that are further from the
        quartiles than 3 times the distance between them. A metric with fixed limits has none.
        Differences have a diverging map around 0, and differences of ranks a scale that is
        logarithmic on both sides.
        """
        parts = []
        for text, part in values:
            is_counted = torch.tensor(text.positions) > 0
            parts.append(part[:, is_counted] if is_counted.any() else part)
        counted = torch.cat([part[part.isfinite()] for part in parts])
        shown = (TRAJECTORY_METRICS | DIVERGENCES)[metric]
        if is_difference and metric in TRAJECTORY_METRICS:
            scale: Scale = "asinh" if shown.scale == "log" else "linear"
            both = torch.cat([counted, -counted, torch.zeros(1)])
            is_bounded = shown.high is not None
            low, high = (0.0, both.max().item()) if is_bounded else _whiskers(both, scale)
            return cls(-high or -1.0, high or 1.0, scale, "RdBu")
        low, high = _whiskers(counted, shown.scale)
        low = low if shown.low is None else shown.low
        high = high if shown.high is None else shown.high
        color_map = "cividis_r" if shown.is_low_better else "cividis"
        return cls(low, high if high > low else low + 1, shown.scale, color_map)

    def changed(self, limits: tuple[float, float] | None, color_map: str | None) -> "ColorScale":
        """The scale with other limits or another colour map, checked."""
        from matplotlib import colormaps

        low, high = (self.low, self.high) if limits is None else limits
        if not low < high or (self.scale == "log" and low <= 0):
            above = " above 0" if self.scale == "log" else ""
            raise InputError(f"limits must be two increasing numbers{above}, got {low} and {high}")
        if color_map is not None and color_map not in colormaps:
            raise InputError(f"cmap must be a colour map of matplotlib, got {color_map!r}")
        return replace(self, low=low, high=high, color_map=color_map or self.color_map)

    def norm(self) -> "Normalize":
        """The scale for matplotlib."""
        from matplotlib.colors import AsinhNorm, LogNorm, Normalize, PowerNorm

        if self.scale == "asinh":
            return AsinhNorm(vmin=self.low, vmax=self.high)

        if self.scale == "sqrt":
            return PowerNorm(0.5, self.low, self.high)
        return (LogNorm if self.scale == "log" else Normalize)(self.low, self.high)

    def colors(self) -> "Colormap":
        """The colour map for matplotlib."""
        from matplotlib import colormaps

        return colormaps[self.color_map].with_extremes(bad=MISSING)


def _whiskers(values: Float[Tensor, " values"], scale: Scale) -> tuple[float, float]:
    """The smallest and the largest value that are not outliers."""
    if not len(values):
        return 0.0, 1.0
    on_scale = _TRANSFORMS[scale](values)
    first, third = on_scale.quantile(torch.tensor([0.25, 0.75])).tolist()
    reach = 3 * (third - first) or math.inf
    inside = values[(on_scale >= first - reach) & (on_scale <= third + reach)]
    return inside.min().item(), inside.max().item()


_TRANSFORMS: dict[Scale, Callable[[Tensor], Tensor]] = {
    "linear": torch.Tensor.float,
    "sqrt": lambda values: values.clamp(min=0).sqrt(),
    "log": torch.log,
    "asinh": torch.asinh,
}


def color_table(color_map: str) -> list[tuple[str, str]]:
    """Every colour of a map from the lowest to the highest, with the ink that is readable on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colors = colormaps[color_map](range(colormaps[color_map].N)).tolist()
    return [(to_hex(color), ink(color)) for color in colors]


def ink(color: Sequence[float]) -> str:
    """Black or white, whichever has more contrast with a colour, as WCAG 2 defines it."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else math.pow((c + 0.055) / 1.055, 2.4) for c in color[:3]
    )
    is_bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > _READABLE
    return "black" if is_bright else "white"
