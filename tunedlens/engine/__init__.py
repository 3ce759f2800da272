"""Decodes states to logits, and computes statistics of distributions, the KL and its gradient."""

from tunedlens.engine.capped import CappedLensKL, make_objective
from tunedlens.engine.decoding import Decoder, chunk_tokens
from tunedlens.engine.objective import LensKL, accumulate_gradient
from tunedlens.engine.statistics import LensStatistics, ModelDistribution, kl_by_layer, measure

__all__ = [
    "CappedLensKL",
    "Decoder",
    "LensKL",
    "LensStatistics",
    "ModelDistribution",
    "accumulate_gradient",
    "chunk_tokens",
    "kl_by_layer",
    "make_objective",
    "measure",
]
