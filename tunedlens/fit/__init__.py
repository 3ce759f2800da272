"""How lenses are fitted: a closed form to start from, then steps; and their rivals."""

from tunedlens.fit.baselines import mean_lens, unigram_lens
from tunedlens.fit.convergence import LearningCurve, Look
from tunedlens.fit.jacobian import SKIPPED_POSITIONS, MeanJacobian
from tunedlens.fit.least_squares import LeastSquares
from tunedlens.fit.optimizer import (
    DEFAULT_HYPERPARAMETERS,
    Hyperparameters,
    LensOptimizer,
    Preconditioned,
    TorchOptimizer,
    evening,
)

__all__ = [
    "DEFAULT_HYPERPARAMETERS",
    "SKIPPED_POSITIONS",
    "Hyperparameters",
    "LearningCurve",
    "LeastSquares",
    "LensOptimizer",
    "Look",
    "MeanJacobian",
    "Preconditioned",
    "TorchOptimizer",
    "evening",
    "mean_lens",
    "unigram_lens",
]
