"""The kinds of lenses, which decode a state of any layer to logits."""

from tunedlens.lenses.affine import AffineLens, JacobianLens, Translator, TunedLens
from tunedlens.lenses.base import Lens, ResidualLens, require_made_for
from tunedlens.lenses.constant import ConstantLens
from tunedlens.lenses.logit import LogitLens

__all__ = [
    "AffineLens",
    "ConstantLens",
    "JacobianLens",
    "Lens",
    "LogitLens",
    "ResidualLens",
    "Translator",
    "TunedLens",
    "require_made_for",
]
