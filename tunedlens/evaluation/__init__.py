"""Metrics of every lens at every layer, over a corpus."""

from tunedlens.evaluation.calls import evaluate
from tunedlens.evaluation.estimates import Estimate, RatioSums
from tunedlens.evaluation.pipeline import score_lenses
from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Result

__all__ = [
    "MODEL",
    "Difference",
    "Estimate",
    "Evaluation",
    "Grid",
    "RatioSums",
    "Result",
    "evaluate",
    "score_lenses",
]
