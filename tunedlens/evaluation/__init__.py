"""Metrics of every lens at every layer, over a corpus."""

from tunedlens.evaluation.calls import evaluate
from tunedlens.evaluation.estimates import Estimate, RatioSums
from tunedlens.evaluation.pipeline import score_lenses
from tunedlens.evaluation.quality import Quality, QualityWarning, measure_quality
from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Result
from tunedlens.evaluation.token_bias import TokenBias, token_bias

__all__ = [
    "MODEL",
    "Difference",
    "Estimate",
    "Evaluation",
    "Grid",
    "Quality",
    "QualityWarning",
    "RatioSums",
    "Result",
    "TokenBias",
    "evaluate",
    "measure_quality",
    "score_lenses",
    "token_bias",
]
