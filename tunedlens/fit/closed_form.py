"""The least-squares map from every layer's state to the final one, in one pass.

It needs no pass through the vocabulary: O(d_model²) per token and layer instead of
O(d_model · vocab). As a lens it is already good, and as a start it spares the steps most
of their way; the sums that it is made of also tell them what size each input has.
"""

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from tunedlens.metrics import reduce_sums

RIDGES = tuple(10.0**exponent for exponent in range(-8, 1))
"""From what float64 can tell from none to half of the mean square of the inputs."""


class LeastSquares:
    """Streaming sums, in float64, of the regression of `final - h` on `h` and a constant.

    The sums of two parts of a text add up to those of the whole.

    Args:
        n_layers: number of states to map.
        d_model: their width.
    """

    def __init__(self, n_layers: int, d_model: int) -> None:
        width = d_model + 1  # the last input is always 1, so that the bias is one more column
        self.inputs = torch.zeros(n_layers, width, width, dtype=torch.float64)
        self.products = torch.zeros(n_layers, width, d_model, dtype=torch.float64)
        self.squares = torch.zeros(n_layers, dtype=torch.float64)

    def add(
        self,
        hidden: Float[Tensor, "layers tokens d_model"],
        final: Float[Tensor, "tokens d_model"],
    ) -> None:
        """Count further tokens."""
        inputs = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        targets = final - hidden
        self.inputs += (inputs.mT @ inputs).double().cpu()
        self.products += (inputs.mT @ targets).double().cpu()
        self.squares += targets.square().sum((1, 2)).double().cpu()

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, in each of them."""
        reduce_sums(accelerator, self.inputs, self.products, self.squares)

    @property
    def second_moment(self) -> Float[Tensor, "layers d_model_plus_1 d_model_plus_1"]:
        """Mean of x xᵀ over tokens, the last of x being 1."""
        return self.inputs / self.inputs[:, -1:, -1:]

    def solve(
        self, ridge: float | Float[Tensor, " layers"]
    ) -> Float[Tensor, "layers d_model d_model_plus_1"]:
        """`[A b]` of h + A h + b, for every layer.

        Args:
            ridge: pulls towards 0, which is the logit lens; relative to the mean square of
                the inputs.
        """
        strength = ridge * self.inputs.diagonal(dim1=-2, dim2=-1).mean(-1)
        identity = torch.eye(self.inputs.shape[-1], dtype=torch.float64)
        system = self.inputs + strength[:, None, None] * identity
        return torch.linalg.solve(system, self.products).mT

    def mean_square_error(
        self, solution: Float[Tensor, "layers d_model d_model_plus_1"]
    ) -> Float[Tensor, " layers"]:
        """Of a solution on the text of these sums, per token and dimension."""
        explained = 2 * self.products - self.inputs @ solution.mT
        tokens, d_model = self.inputs[:, -1, -1], solution.shape[1]
        return (self.squares - (solution.mT * explained).sum((1, 2))) / tokens / d_model

    def best_ridge(self, held_out: "LeastSquares") -> Float[Tensor, " layers"]:
        """For every layer the one of `RIDGES` whose solution errs least on held-out text."""
        errors = [held_out.mean_square_error(self.solve(ridge)) for ridge in RIDGES]
        return torch.tensor(RIDGES, dtype=torch.float64)[torch.stack(errors).argmin(0)]
