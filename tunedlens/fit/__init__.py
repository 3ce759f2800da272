"""How lenses are fitted: a closed form to start from, then steps; and their rivals."""

from tunedlens.fit.baselines import mean_lens, unigram_lens
from tunedlens.fit.closed_form import LeastSquares
from tunedlens.fit.gradient import accumulate_gradient
from tunedlens.fit.jacobian import SKIPPED_POSITIONS, MeanJacobian
from tunedlens.fit.steps import RECIPES, Peer, Preconditioned, Recipe, Steps, evening
from tunedlens.fit.stopping import LearningCurve, Look

__all__ = [
    "RECIPES",
    "SKIPPED_POSITIONS",
    "LearningCurve",
    "LeastSquares",
    "Look",
    "MeanJacobian",
    "Peer",
    "Preconditioned",
    "Recipe",
    "Steps",
    "accumulate_gradient",
    "evening",
    "mean_lens",
    "unigram_lens",
]
