"""Plots for a paper, as vector graphics and as 2x raster images, readable in grey."""

from tunedlens.report.plots.by_layer import by_layer
from tunedlens.report.plots.causal import alignment_by_layer, effects_scatter, influences
from tunedlens.report.plots.curves import curves, draw_learning_curve, learning_curve
from tunedlens.report.plots.drawings import DRAWINGS
from tunedlens.report.plots.early_exit import exit_curves
from tunedlens.report.plots.grids import by_position, transfer
from tunedlens.report.plots.heatmaps import heatmap, heatmap_pages
from tunedlens.report.plots.style import FORMATS, in_all_formats, in_svg, rendered, save

__all__ = [
    "DRAWINGS",
    "FORMATS",
    "alignment_by_layer",
    "by_layer",
    "by_position",
    "curves",
    "draw_learning_curve",
    "effects_scatter",
    "exit_curves",
    "heatmap",
    "heatmap_pages",
    "in_all_formats",
    "in_svg",
    "influences",
    "learning_curve",
    "rendered",
    "save",
    "transfer",
]
