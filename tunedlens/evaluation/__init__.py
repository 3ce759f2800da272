"""From a corpus to metrics of every lens at every layer."""

from tunedlens.evaluation.estimates import Estimate, Estimates, RatioSums, to_estimates
from tunedlens.evaluation.pipeline import evaluate
from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Result
from tunedlens.evaluation.scoring import score_lenses

__all__ = [
    "MODEL",
    "Difference",
    "Estimate",
    "Estimates",
    "Evaluation",
    "Grid",
    "RatioSums",
    "Result",
    "evaluate",
    "score_lenses",
    "to_estimates",
]
