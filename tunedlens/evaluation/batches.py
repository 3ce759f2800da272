"""What is measured in one batch of blocks, and how its arrays are laid out."""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens.lenses import AffineLens, ConstantLens, Lens

TRANSFER_METRICS = ("kl_nats", "cross_entropy_nats")
"""Metrics of a translator that is applied at another layer."""


class Layout(NamedTuple):
    """The distributions that are computed at every token.

    A column is a lens, in the order given, or last the model. A row is one distribution: a lens at
    a layer, a constant lens (once for all layers), or last the model.
    """

    lenses: Mapping[str, Lens]
    decodings: list[tuple[Lens, int]]
    """Lens and layer of every row but the model's."""
    rows: Int[Tensor, "layers columns"]
    """The row of every column at every layer."""
    transfer_lenses: list[str]
    """Names of the lenses whose translators are applied at every layer."""

    @classmethod
    def of(cls, lenses: Mapping[str, Lens], n_layers: int, *, transfer: bool) -> Self:
        """The layout for lenses on a model with n layers."""
        decodings: list[tuple[Lens, int]] = []
        columns = []
        for lens in lenses.values():
            layers = range(1 if isinstance(lens, ConstantLens) else n_layers)
            first = len(decodings)
            columns.append([first + min(layer, layers[-1]) for layer in range(n_layers)])
            decodings += [(lens, layer) for layer in layers]
        columns.append([len(decodings)] * n_layers)
        affine = [name for name, lens in lenses.items() if isinstance(lens, AffineLens)]
        return cls(lenses, decodings, torch.tensor(columns).T, affine if transfer else [])

    @property
    def n_rows(self) -> int:
        """Number of distributions, the model's included."""
        return len(self.decodings) + 1


class ScoredBatch(NamedTuple):
    """Measurements of a batch of blocks. All but `probability_sums` are on the CPU."""

    values: dict[str, Float[Tensor, "layers columns batch positions"]]
    """Per-token metrics by name; 0 at positions that are not scored."""
    is_scored: Bool[Tensor, "batch positions"]
    text_bytes: Int[Tensor, "batch positions"]
    """Bytes that each predicted token stands for; 0 at positions that are not scored."""
    groups: Int[Tensor, " batch"]
    """The jackknife's group of every block."""
    probability_sums: Float[Tensor, "groups rows vocab"]
    """Sums over scored positions, for every group of the batch in ascending order."""
    transfer: Float[Tensor, "metrics translators layers lenses batch"]
    """Sums of `TRANSFER_METRICS` over scored positions."""
