"""One text through the layers: the predictions of lenses at every layer and position."""

from tunedlens.trajectories.comparison import Comparison, difference
from tunedlens.trajectories.compute import compare, trajectory
from tunedlens.trajectories.result import TOKENS, Row, Trajectory

__all__ = ["TOKENS", "Comparison", "Row", "Trajectory", "compare", "difference", "trajectory"]
