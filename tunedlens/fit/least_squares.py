"""Ridge regression of the final state on the state of every layer, in one pass over a text.

It does not use the unembedding: a token costs O(d_model²) per layer instead of
O(d_model · vocab). The solution is a good lens by itself and the starting point of the optimizer,
which also takes its preconditioner from the sums.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from tunedlens.distributed import reduce_sums

RIDGES = tuple(10.0**exponent for exponent in range(-8, 1))
"""Candidates for the ridge, relative to the mean square of the inputs."""
_FLOAT32_TOKENS = 4096
"""Tokens that are summed in float32 before the sum is added to the one in float64."""


class LeastSquares:
    """Streaming sums, in float64, of the regression of `final - h` on `h` and a constant.

    The sums over two parts of a text add up to those over the whole. A few thousand tokens at
    a time are summed in float32 on the device of the states; the totals are float64 on the CPU.

    Args:
        n_layers: the number of states to map.
    """

    def __init__(self, n_layers: int, d_model: int) -> None:
        self._d_model, width = d_model, d_model + 1
        # The last input is always 1, so the bias is the last column of the solution.
        self._inputs = torch.zeros(n_layers, width, width, dtype=torch.float64)
        self._products = torch.zeros(n_layers, width, d_model, dtype=torch.float64)
        self._squares = torch.zeros(n_layers, dtype=torch.float64)
        self._pending: list[Tensor] = []
        self._pending_tokens = 0

    def add(
        self,
        hidden: Sequence[Float[Tensor, "tokens d_model"]],
        final: Float[Tensor, "tokens d_model"],
    ) -> None:
        """Add tokens: the states of every layer and the final states."""
        if not self._pending:
            sums = (self._inputs, self._products, self._squares)
            self._pending = [final.new_zeros(part.shape) for part in sums]
        inputs, products, squares = self._pending
        d_model = self._d_model
        for layer, state in enumerate(hidden):
            target = final - state
            inputs[layer, :d_model, :d_model].addmm_(state.T, state)
            inputs[layer, d_model, :d_model].add_(state.sum(0))
            products[layer, :d_model].addmm_(state.T, target)
            products[layer, d_model].add_(target.sum(0))
            squares[layer].add_(target.square_().sum())
        inputs[:, d_model, d_model] += len(final)
        self._pending_tokens += len(final)
        if self._pending_tokens >= _FLOAT32_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._pending_tokens:
            return
        for total, pending in zip(
            (self._inputs, self._products, self._squares), self._pending, strict=True
        ):
            total += pending.cpu().double()
            pending.zero_()
        d_model = self._d_model
        self._inputs[:, :d_model, d_model] = self._inputs[:, d_model, :d_model]
        self._pending_tokens = 0

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes; every process gets the totals."""
        self._flush()
        reduce_sums(accelerator, self._inputs, self._products, self._squares)

    @property
    def inputs(self) -> Float[Tensor, "layers d_model_plus_1 d_model_plus_1"]:
        """Sum of x xᵀ over tokens, with x = [h, 1]."""
        self._flush()
        return self._inputs

    @property
    def products(self) -> Float[Tensor, "layers d_model_plus_1 d_model"]:
        """Sum of x (final − h)ᵀ over tokens."""
        self._flush()
        return self._products

    @property
    def squares(self) -> Float[Tensor, " layers"]:
        """Sum of |final − h|² over tokens."""
        self._flush()
        return self._squares

    @property
    def second_moment(self) -> Float[Tensor, "layers d_model_plus_1 d_model_plus_1"]:
        """Mean of x xᵀ over tokens, with x = [h, 1]."""
        return self.inputs / self.inputs[:, -1:, -1:]

    def solve(
        self, ridge: float | Float[Tensor, " layers"]
    ) -> Float[Tensor, "layers d_model d_model_plus_1"]:
        """The translators `[A b]` of h + A h + b for every layer.

        Args:
            ridge: relative to the mean square of the inputs. It pulls towards 0, which is the
                logit lens.
        """
        strength = ridge * self.inputs.diagonal(dim1=-2, dim2=-1).mean(-1)
        identity = torch.eye(self.inputs.shape[-1], dtype=torch.float64)
        system = self.inputs + strength[:, None, None] * identity
        return torch.linalg.solve(system, self.products).mT

    def mean_square_error(
        self, solution: Float[Tensor, "layers d_model d_model_plus_1"]
    ) -> Float[Tensor, " layers"]:
        """Mean square error of a solution on the summed tokens, per token and dimension."""
        explained = 2 * self.products - self.inputs @ solution.mT
        tokens, d_model = self.inputs[:, -1, -1], solution.shape[1]
        return (self.squares - (solution.mT * explained).sum((1, 2))) / tokens / d_model

    def best_ridge(self, held_out: "LeastSquares") -> Float[Tensor, " layers"]:
        """For every layer, the ridge in `RIDGES` with the smallest error on held-out text."""
        ridges = torch.tensor(RIDGES, dtype=torch.float64)
        best = []
        for inputs, products, their_inputs, their_products in zip(
            self.inputs, self.products, held_out.inputs, held_out.products, strict=True
        ):
            # In the eigenbasis of the inputs, solving for one more ridge is one division.
            values, vectors = torch.linalg.eigh(inputs)
            damped = values.clamp(min=0) + ridges[:, None] * values.mean()
            solutions = (vectors.T @ products) / damped[..., None]
            curvature, slope = vectors.T @ their_inputs @ vectors, vectors.T @ their_products
            errors = [(x * (curvature @ x - 2 * slope)).sum() for x in solutions]
            best.append(torch.stack(errors).argmin())
        return ridges[torch.stack(best)]
