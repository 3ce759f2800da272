"""Plots for a paper, as vector graphics and as 2x raster images, readable in grey."""

from tunedlens.report.plots.by_layer import (
    DRAWINGS,
    Drawing,
    agreement_by_layer,
    by_layer,
    by_position,
    overview,
    prediction_depth,
    transfer,
)
from tunedlens.report.plots.heatmaps import heatmap, heatmap_pages
from tunedlens.report.plots.learning import draw_learning_curve, learning_curve
from tunedlens.report.plots.style import KINDS, rendered, save, styles
from tunedlens.report.plots.token_curves import curves

__all__ = [
    "DRAWINGS",
    "KINDS",
    "Drawing",
    "agreement_by_layer",
    "by_layer",
    "by_position",
    "curves",
    "draw_learning_curve",
    "heatmap",
    "heatmap_pages",
    "learning_curve",
    "overview",
    "prediction_depth",
    "rendered",
    "save",
    "styles",
    "transfer",
]
