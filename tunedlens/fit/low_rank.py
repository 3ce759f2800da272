"""Translators of low rank."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.fit.least_squares import Translators


class LowRankTranslators(NamedTuple):
    """`h + L R h + b` for every layer."""

    left: Float[Tensor, "layers d_model rank"]
    right: Float[Tensor, "layers rank d_model"]
    bias: Float[Tensor, "layers d_model"]


def nearest_of_rank(
    translators: Translators,
    second_moment: Float[Tensor, "layers d_model_plus_1 d_model_plus_1"],
    rank: int,
) -> LowRankTranslators:
    """The translators of a given rank that change the states as similarly as possible.

    They minimise the mean square distance to the states that the given translators produce. The
    columns of L are the leading principal components of A h, R is Lᵀ A, and the bias contains the
    mean of the remaining components.

    Args:
        translators: `[A b]` of every layer.
        second_moment: mean of x xᵀ over tokens, with x = [h, 1].

    Source:
        Izenman 1975, "Reduced-rank regression for the multivariate linear model".
    """
    weight, bias, mean = translators[..., :-1], translators[..., -1], second_moment[:, :-1, -1]
    covariance = second_moment[:, :-1, :-1] - mean[:, :, None] * mean[:, None]
    left = torch.linalg.eigh(weight @ covariance @ weight.mT).eigenvectors[..., -rank:]
    right = left.mT @ weight
    rest = ((weight - left @ right) @ mean[..., None])[..., 0]
    return LowRankTranslators(left, right, bias + rest)
