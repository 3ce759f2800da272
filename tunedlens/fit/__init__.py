"""How translators are fitted: a closed form to start from, then steps."""

from tunedlens.fit.closed_form import LeastSquares
from tunedlens.fit.gradient import accumulate_gradient
from tunedlens.fit.steps import RECIPES, Peer, Preconditioned, Recipe, Steps, evening
from tunedlens.fit.stopping import LearningCurve, Look

__all__ = [
    "RECIPES",
    "LearningCurve",
    "LeastSquares",
    "Look",
    "Peer",
    "Preconditioned",
    "Recipe",
    "Steps",
    "accumulate_gradient",
    "evening",
]
