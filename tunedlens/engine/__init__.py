"""States to logits to what is known of a distribution; the KL and its gradient."""

from tunedlens.engine.backend import DTYPES, Backend, fastest_backend
from tunedlens.engine.capped import CappedLensKL, make_objective
from tunedlens.engine.decoding import Decoder, chunk_tokens
from tunedlens.engine.keys import Keys
from tunedlens.engine.objective import LensKL, ModelSide, accumulate_gradient
from tunedlens.engine.statistics import LensStatistics, ModelDistribution, measure
from tunedlens.engine.vocab_sample import VocabSample, draw_sample

__all__ = [
    "DTYPES",
    "Backend",
    "CappedLensKL",
    "Decoder",
    "Keys",
    "LensKL",
    "LensStatistics",
    "ModelDistribution",
    "ModelSide",
    "VocabSample",
    "accumulate_gradient",
    "chunk_tokens",
    "draw_sample",
    "fastest_backend",
    "make_objective",
    "measure",
]
