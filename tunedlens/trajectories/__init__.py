"""One text through the layers: the predictions of lenses at every layer and position."""

from tunedlens.trajectories.comparison import Comparison, difference
from tunedlens.trajectories.compute import compare, trajectory
from tunedlens.trajectories.predictions import LensPredictions, Row
from tunedlens.trajectories.result import TOKENS, Trajectory

__all__ = [
    "TOKENS",
    "Comparison",
    "LensPredictions",
    "Row",
    "Trajectory",
    "compare",
    "difference",
    "trajectory",
]
