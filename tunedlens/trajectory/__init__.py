"""One text through the layers: what every lens says at every layer and position."""

from tunedlens.trajectory.compute import trajectory
from tunedlens.trajectory.predictions import LensPredictions
from tunedlens.trajectory.result import (
    DIVERGENCES,
    FIGURES,
    FIGURES_OF_A_TOKEN,
    Trajectory,
    single_ids,
    whose,
)
from tunedlens.trajectory.windows import Row

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
