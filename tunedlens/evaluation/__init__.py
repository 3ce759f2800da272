"""Metrics of every lens at every layer, over a corpus."""

from tunedlens.evaluation.calls import evaluate
from tunedlens.evaluation.estimates import Estimate, RatioSums
from tunedlens.evaluation.pipeline import score_lenses
from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Result
from tunedlens.evaluation.token_bias import TokenBias, token_bias

__all__ = [
    "MODEL",
    "Difference",
    "Estimate",
    "Evaluation",
    "Grid",
    "RatioSums",
    "Result",
    "TokenBias",
    "evaluate",
    "score_lenses",
    "token_bias",
]
