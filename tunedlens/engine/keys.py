"""Rows of the unembedding as the keys of a softmax attention whose queries are normed states."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Keys(NamedTuple):
    """Rows of the unembedding that a softmax runs over, in the dtype of the products."""

    rows: Float[Tensor, "rows width"]
    """The unembedding, a column of ones, two more where each row has an offset of its own, and
    zeros up to a multiple of 8, which GPUs multiply faster."""
    d_model: int

    def query(
        self, normed: Float[Tensor, "tokens d_model"], shift: Float[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens width"]:
        """Normed states such that the product with the rows is their logits less the shift.

        A shift near the largest logit leaves the logits that matter near 0, where half precision
        is fine. It is rounded to that precision; `shift_of` tells what is taken away.
        """
        query = normed.new_ones(len(normed), self.rows.shape[1], dtype=self.rows.dtype)
        query[:, : self.d_model] = normed
        query[:, self.d_model] = 0 if shift is None else -shift
        return query

    def shift_of(self, query: Float[Tensor, "tokens width"]) -> Float[Tensor, " tokens"]:
        """The shift as the product takes it away."""
        return -upcast(query[:, self.d_model])


def make_keys(
    weight: Float[Tensor, "rows d_model"], offsets: Float[Tensor, " rows"] | None
) -> Keys:
    """Rows with a column of ones, and the offsets in two: rounded, and what is left of them."""
    columns = [weight, weight.new_ones(len(weight), 1)]
    if offsets is not None:
        rounded = offsets.to(weight.dtype)
        columns += [rounded[:, None], (offsets - rounded).to(weight.dtype)[:, None]]
    width = weight.shape[1] + len(columns) - 1
    columns.append(weight.new_zeros(len(weight), -width % 8))
    return Keys(torch.cat(columns, 1), weight.shape[1])


def upcast(values: Tensor) -> Tensor:
    """To the dtype of accumulation: float32, or float64 where the values are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
