"""Ablation in the model's run, causal bases, and their effects on a lens and on the model."""

from tunedlens.causal.ablation import ablated
from tunedlens.causal.basis import CausalBasis, causal_basis
from tunedlens.causal.effects import CausalEffects, Correlation, causal_effects, spearman
from tunedlens.causal.inversion import Inversion, invert
from tunedlens.causal.response import (
    Alignment,
    aitchison_similarity,
    alignment_table,
    response_alignment,
)
from tunedlens.causal.targets import Block, Directions, Head, Neuron, Target

__all__ = [
    "Alignment",
    "Block",
    "CausalBasis",
    "CausalEffects",
    "Correlation",
    "Directions",
    "Head",
    "Inversion",
    "Neuron",
    "Target",
    "ablated",
    "aitchison_similarity",
    "alignment_table",
    "causal_basis",
    "causal_effects",
    "invert",
    "response_alignment",
    "spearman",
]
