"""A frozen language model: loading, its residual stream, its unembedding, its identity."""

from tunedlens.model.frozen import FrozenModel
from tunedlens.model.identity import ModelIdentity, require_same_model
from tunedlens.model.loading import load_configured, load_model, load_shape
from tunedlens.model.probe import probe_ids, probe_kl, probe_tolerance, take_probe
from tunedlens.model.quantised import count_weights, is_quantised
from tunedlens.model.shape import ModelShape, shape_of
from tunedlens.model.sites import SITES, TRANSLATED_SITES, HookPoint, hook_points
from tunedlens.model.unembedding import Unembedding

__all__ = [
    "SITES",
    "TRANSLATED_SITES",
    "FrozenModel",
    "HookPoint",
    "ModelIdentity",
    "ModelShape",
    "Unembedding",
    "count_weights",
    "hook_points",
    "is_quantised",
    "load_configured",
    "load_model",
    "load_shape",
    "probe_ids",
    "probe_kl",
    "probe_tolerance",
    "require_same_model",
    "shape_of",
    "take_probe",
]
