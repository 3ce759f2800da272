"""A corpus in, metrics of every lens and layer out."""

from tunedlens.evaluation.estimates import Estimate, RatioSums, to_estimates
from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Result
from tunedlens.evaluation.scoring import score_lenses

__all__ = [
    "MODEL",
    "Difference",
    "Estimate",
    "Evaluation",
    "Grid",
    "RatioSums",
    "Result",
    "score_lenses",
    "to_estimates",
]
