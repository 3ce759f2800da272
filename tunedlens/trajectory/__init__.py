"""One text through the layers: what every lens says at every layer and position."""

from tunedlens.trajectory.read import trajectory
from tunedlens.trajectory.reading import Reading
from tunedlens.trajectory.result import (
    DIVERGENCES,
    FIGURES,
    FIGURES_OF_A_TOKEN,
    Trajectory,
    single_ids,
    whose,
)
from tunedlens.trajectory.states import Row
from tunedlens.trajectory.top_k import TopK

__all__ = [
    "DIVERGENCES",
    "FIGURES",
    "FIGURES_OF_A_TOKEN",
    "Reading",
    "Row",
    "TopK",
    "Trajectory",
    "single_ids",
    "trajectory",
    "whose",
]
