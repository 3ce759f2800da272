"""The kinds of lens: from a state of any layer to logits."""

from tunedlens.lenses.lens import (
    AffineLens,
    ConstantLens,
    JacobianLens,
    Lens,
    LogitLens,
    ResidualLens,
    Translator,
    TunedLens,
    require_made_for,
)

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
