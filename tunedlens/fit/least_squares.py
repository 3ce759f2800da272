"""Ridge regression of the final state on the state of every layer, in one pass over a text.

It does not use the unembedding: a token costs O(d_model²) per layer instead of
O(d_model · vocab). The solution is a good lens by itself and the starting point of the optimizer,
which also takes its preconditioner from the sums.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from tunedlens.devices import device_of_sums
from tunedlens.distributed import reduce_sums

PerLayer = Float[Tensor, " layers"]
Translators = Float[Tensor, "layers d_model d_model_plus_1"]
"""`[A b]` of h + A h + b for every layer."""

RIDGES = tuple(10.0**exponent for exponent in range(-8, 1))
"""Candidates for the ridge, relative to the mean square of the inputs."""
_FLOAT32_TOKENS = 4096
"""The number of tokens that are summed in float32 before the sum is added to the float64 total."""


class Sums(NamedTuple):
    """Sums over tokens, for every layer, with the inputs x = [h, 1]."""

    inputs: Float[Tensor, "layers d_model_plus_1 d_model_plus_1"]
    """Sum of x xᵀ."""
    products: Float[Tensor, "layers d_model_plus_1 d_model"]
    """Sum of x (final − h)ᵀ."""
    squares: PerLayer
    """Sum of |final − h|²."""


class LeastSquares:
    """Streaming sums of the regression of `final - h` on `h` and a constant.

    The sums over two parts of a text add up to those over the whole. A few thousand tokens at
    a time are summed in float32; the totals are float64. Both are on the device of the states. If
    the totals do not fit there, they are on the CPU.

    Args:
        n_layers: the number of states to map, over all sites.
    """

    def __init__(self, n_layers: int, d_model: int) -> None:
        # The last input is always 1, so the bias is the last column of the solution.
        width = d_model + 1
        shapes = ((n_layers, width, width), (n_layers, width, d_model), (n_layers,))
        self._totals = Sums(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
        self._pending: Sums | None = None
        self._pending_tokens = 0

    def add(
        self,
        hidden: Sequence[Float[Tensor, "tokens d_model"]],
        final: Float[Tensor, "tokens d_model"],
    ) -> None:
        """Add tokens: the states of every layer and the final states."""
        if self._pending is None:
            self._pending = Sums(*(final.new_zeros(total.shape) for total in self._totals))
            place = device_of_sums(final.device, sum(total.numel() for total in self._totals))
            self._totals = Sums(*(total.to(place) for total in self._totals))
        inputs, products, squares = self._pending
        for layer, state in enumerate(hidden):
            target = final - state
            inputs[layer, :-1, :-1].addmm_(state.T, state)
            inputs[layer, -1, :-1].add_(state.sum(0))
            products[layer, :-1].addmm_(state.T, target)
            products[layer, -1].add_(target.sum(0))
            squares[layer].add_(target.square_().sum())
        inputs[:, -1, -1] += len(final)
        self._pending_tokens += len(final)
        if self._pending_tokens >= _FLOAT32_TOKENS:
            self.sums()

    def sums(self) -> Sums:
        """The sums over all tokens so far; those that are pending move to the totals."""
        if self._pending is not None and self._pending_tokens:
            for total, pending in zip(self._totals, self._pending, strict=True):
                total += pending.to(total.device).double()
                pending.zero_()
            self._totals.inputs[:, :-1, -1] = self._totals.inputs[:, -1, :-1]
            self._pending_tokens = 0
        return self._totals

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes; every process gets the totals."""
        reduce_sums(accelerator, *self.sums())

    @property
    def second_moment(self) -> Float[Tensor, "layers d_model_plus_1 d_model_plus_1"]:
        """Mean of x xᵀ over tokens."""
        inputs = self.sums().inputs
        return inputs / inputs[:, -1:, -1:]

    def solve(self, ridge: float | PerLayer) -> Translators:
        """The translators that minimise the squared error.

        Args:
            ridge: relative to the mean square of the inputs. It pulls towards 0, which is the
                logit lens.
        """
        inputs, products, _ = self.sums()
        strength = ridge * inputs.diagonal(dim1=-2, dim2=-1).mean(-1)
        identity = torch.eye(inputs.shape[-1], dtype=torch.float64, device=inputs.device)
        system = inputs + strength[:, None, None] * identity
        # Not linalg.solve: with more than one thread set, MKL's LU fails for a batch on some CPUs.
        factor, is_indefinite = torch.linalg.cholesky_ex(system)
        solution = torch.cholesky_solve(products, factor)
        # Rounding of the float32 sums can make an eigenvalue more negative than a small ridge.
        for layer in is_indefinite.nonzero().flatten().tolist():
            values, vectors = torch.linalg.eigh(inputs[layer])
            damped = values.clamp(min=0) + strength[layer]
            solution[layer] = vectors @ ((vectors.mT @ products[layer]) / damped[:, None])
        return solution.mT

    def mean_difference(self) -> Translators:
        """The translators without a weight that minimise the squared error: h + mean(final − h)."""
        inputs, products, _ = self.sums()
        solution = torch.zeros_like(products.mT)
        solution[:, :, -1] = products[:, -1] / inputs[:, -1, -1, None]
        return solution

    def mean_square_error(self, solution: Translators) -> PerLayer:
        """Mean square error of a solution on the summed tokens, per token and dimension."""
        inputs, products, squares = self.sums()
        explained = 2 * products - inputs @ solution.mT
        tokens, d_model = inputs[:, -1, -1], solution.shape[1]
        return (squares - (solution.mT * explained).sum((1, 2))) / tokens / d_model

    def best_ridge(self, held_out: "LeastSquares") -> PerLayer:
        """For every layer, the ridge in `RIDGES` with the smallest error on held-out text."""
        device, best = self._totals.inputs.device, []
        ridges = torch.tensor(RIDGES, dtype=torch.float64, device=device)
        theirs = Sums(*(total.to(device) for total in held_out.sums()))
        for (inputs, products, _), (their_inputs, their_products, _) in zip(
            zip(*self.sums(), strict=True), zip(*theirs, strict=True), strict=True
        ):
            # In the eigenbasis of the inputs, solving for one more ridge is one division.
            values, vectors = torch.linalg.eigh(inputs)
            damped = values.clamp(min=0) + ridges[:, None] * values.mean()
            solutions = (vectors.T @ products) / damped[..., None]
            curvature, slope = vectors.T @ their_inputs @ vectors, vectors.T @ their_products
            errors = [(x * (curvature @ x - 2 * slope)).sum() for x in solutions]
            best.append(torch.stack(errors).argmin())
        return ridges[torch.stack(best)]
