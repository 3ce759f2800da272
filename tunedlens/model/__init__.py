"""A frozen language model: loading, its residual stream, its unembedding, its identity."""

from tunedlens.model.frozen import FrozenModel, Unembedding, load_configured, load_model
from tunedlens.model.identity import ModelIdentity, require_same_model
from tunedlens.model.sites import SITES

__all__ = [
    "SITES",
    "FrozenModel",
    "ModelIdentity",
    "Unembedding",
    "load_configured",
    "load_model",
    "require_same_model",
]
