"""How lenses are fitted: least squares, optimizers, the mean Jacobian and baselines."""

from tunedlens.fit.baselines import mean_lens, unigram_lens
from tunedlens.fit.convergence import ValidationResult, converged_layers
from tunedlens.fit.jacobian import SKIPPED_POSITIONS, MeanJacobian
from tunedlens.fit.least_squares import LeastSquares
from tunedlens.fit.low_rank import nearest_of_rank
from tunedlens.fit.optimizer import (
    DEFAULT_HYPERPARAMETERS,
    LensOptimizer,
    PreconditionedMuon,
    TorchOptimizer,
    preconditioner,
)

__all__ = [
    "DEFAULT_HYPERPARAMETERS",
    "SKIPPED_POSITIONS",
    "LeastSquares",
    "LensOptimizer",
    "MeanJacobian",
    "PreconditionedMuon",
    "TorchOptimizer",
    "ValidationResult",
    "converged_layers",
    "mean_lens",
    "nearest_of_rank",
    "preconditioner",
    "unigram_lens",
]
