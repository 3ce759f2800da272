"""How lenses are fitted: least squares, optimizers, the mean Jacobian and baselines."""

from tunedlens.fit.baselines import mean_lens, unigram_lens
from tunedlens.fit.convergence import (
    MIN_GAIN,
    MIN_TOKENS_PER_DIMENSION,
    Doubling,
    ValidationResult,
    converged_layers,
    last_doubling,
)
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
    "MIN_GAIN",
    "MIN_TOKENS_PER_DIMENSION",
    "SKIPPED_POSITIONS",
    "Doubling",
    "LeastSquares",
    "LensOptimizer",
    "MeanJacobian",
    "PreconditionedMuon",
    "TorchOptimizer",
    "ValidationResult",
    "converged_layers",
    "last_doubling",
    "mean_lens",
    "nearest_of_rank",
    "preconditioner",
    "unigram_lens",
]
