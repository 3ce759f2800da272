"""One text through the layers: what every lens says at every layer and position."""

from tunedlens.trajectories.compute import trajectory
from tunedlens.trajectories.predictions import LensPredictions
from tunedlens.trajectories.result import (
    DIVERGENCES,
    FIGURES,
    FIGURES_OF_A_TOKEN,
    Trajectory,
    single_ids,
    whose,
)
from tunedlens.trajectories.windows import Row

__all__ = [
    "DIVERGENCES",
    "FIGURES",
    "FIGURES_OF_A_TOKEN",
    "LensPredictions",
    "Row",
    "Trajectory",
    "single_ids",
    "trajectory",
    "whose",
]
