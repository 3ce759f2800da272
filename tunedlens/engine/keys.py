"""Rows of the unembedding as the keys of a softmax attention whose queries are normed states."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Keys(NamedTuple):
    """Rows of the unembedding that the softmax runs over, in the dtype of the products."""

    rows: Float[Tensor, "rows width"]
    """The unembedding and further columns: one of ones for the shift of the query, two for the
    offset of each row if there are offsets, and zeros up to a multiple of 8, which GPUs multiply
    faster."""
    d_model: int

    def query(
        self, normed: Float[Tensor, "tokens d_model"], shift: Float[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens width"]:
        """Queries whose products with the rows are the logits minus the shift.

        A shift near the largest logit keeps the largest logits near 0, where half precision is
        accurate. The shift itself is rounded to that precision; `shift_of` returns its rounded
        value.
        """
        query = normed.new_ones(len(normed), self.rows.shape[1], dtype=self.rows.dtype)
        query[:, : self.d_model] = normed
        query[:, self.d_model] = 0 if shift is None else -shift
        return query

    def shift_of(self, query: Float[Tensor, "tokens width"]) -> Float[Tensor, " tokens"]:
        """The shift that the product subtracts, after rounding."""
        return -upcast(query[:, self.d_model])


def make_keys(
    weight: Float[Tensor, "rows d_model"], offsets: Float[Tensor, " rows"] | None
) -> Keys:
    """Append the column of ones and the offsets, each as its rounded value and the remainder."""
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
