"""Colour scales of heatmaps: one definition for figures and for the interactive page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.metrics import DIVERGENCES, TRAJECTORY_METRICS
from tunedlens.trajectories import Trajectory

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

COLOR_MAPS = ("cividis", "cividis_r", "RdBu")
MISSING = "#d9d9d9"
"""The colour of a cell without a value."""
_READABLE = 0.179
"""Above this luminance, black letters have more contrast than white ones."""


@dataclass(frozen=True)
class ColorScale:
    """How values become colours."""

    low: float
    high: float
    scale: str
    """`linear`, `sqrt` or `log`."""
    color_map: str
    """One of `COLOR_MAPS`."""

    @classmethod
    def from_values(
        cls,
        metric: str,
        values: Sequence[tuple[Trajectory, Float[Tensor, "rows positions"]]],
        *,
        is_difference: bool = False,
    ) -> "ColorScale":
        """The scale of a metric for the values of several texts or lenses.

        Position 0 of a text does not influence the limits, because it is unlike all others.
        Differences have a diverging map around 0.
        """
        parts = []
        for text, part in values:
            is_counted = torch.tensor(text.positions) > 0
            parts.append(part[:, is_counted] if is_counted.any() else part)
        counted = torch.cat([part[part.isfinite()] for part in parts])
        low, high = (counted.min().item(), counted.max().item()) if len(counted) else (0.0, 1.0)
        if is_difference and metric in TRAJECTORY_METRICS:
            largest = max(abs(low), abs(high)) or 1.0
            return cls(-largest, largest, "linear", "RdBu")
        shown = (TRAJECTORY_METRICS | DIVERGENCES)[metric]
        low = low if shown.low is None else shown.low
        high = high if shown.high is None else shown.high
        color_map = "cividis_r" if shown.is_low_better else "cividis"
        return cls(low, high if high > low else low + 1, shown.scale, color_map)

    def norm(self) -> "Normalize":
        """The scale for matplotlib."""
        from matplotlib.colors import LogNorm, Normalize, PowerNorm

        if self.scale == "sqrt":
            return PowerNorm(0.5, self.low, self.high)
        return (LogNorm if self.scale == "log" else Normalize)(self.low, self.high)

    def colors(self) -> "Colormap":
        """The colour map for matplotlib."""
        from matplotlib import colormaps

        return colormaps[self.color_map].with_extremes(bad=MISSING)


def color_table(color_map: str) -> list[tuple[str, str]]:
    """Every colour of a map from the lowest to the highest, with the ink that is readable on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colors = [colormaps[color_map](i) for i in range(colormaps[color_map].N)]
    return [(to_hex(color), ink(color)) for color in colors]


def ink(color: Sequence[float]) -> str:
    """Black or white, whichever has more contrast with a colour, as WCAG 2 defines it."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else math.pow((c + 0.055) / 1.055, 2.4) for c in color[:3]
    )
    is_bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > _READABLE
    return "black" if is_bright else "white"
