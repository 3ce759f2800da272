"""A corpus in, figures for every lens and layer out."""

from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Result
from tunedlens.evaluation.scoring import evaluate

__all__ = ["MODEL", "Difference", "Evaluation", "Grid", "Result", "evaluate"]
