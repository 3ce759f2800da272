"""States to logits to statistics of a distribution; the KL and its gradient."""

from tunedlens.engine.decoding import Decoder, chunk_tokens
from tunedlens.engine.objective import LensKL, accumulate_gradient
from tunedlens.engine.statistics import LensStatistics, ModelDistribution, measure

__all__ = [
    "Decoder",
    "LensKL",
    "LensStatistics",
    "ModelDistribution",
    "accumulate_gradient",
    "chunk_tokens",
    "measure",
]
