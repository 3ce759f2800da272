"""The mean Jacobian of the final state in every layer's state, by backward passes."""

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.frozen import FrozenModel

SKIPPED_POSITIONS = 16
"""At the start of each block: the first positions are attention sinks with states unlike all
others, so they are neither differentiated nor a target."""


class MeanJacobian:
    """Streaming mean of d final / d state of every layer.

    Every output dimension takes one backward pass for a whole batch, with a cotangent of 1 at
    every target position at once. So what a source position p gets is the sum over targets
    p' >= p of d final[p'] / d state[p]: what the state does to all that the model goes on to
    say, as in the paper. Causality leaves out p' < p; the first positions are skipped both as
    sources and as targets. The mean is over source positions.

    Args:
        n_layers: number of states to differentiate.
        d_model: their width.

    Source:
        Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in
        Language Models", transformer-circuits.pub/2026/workspace.
    """

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.sums = torch.zeros(n_layers, d_model, d_model, dtype=torch.float64)
        self.positions = torch.zeros((), dtype=torch.float64)

    def add(self, model: FrozenModel, input_ids: Int[Tensor, "batch seq"]) -> None:
        """Count the source positions of further blocks."""
        *states, final = model.residual_stream(input_ids, differentiable=True)
        skipped = min(SKIPPED_POSITIONS, input_ids.shape[1] - 1)
        cotangent = torch.zeros_like(final)
        for output in range(final.shape[-1]):
            cotangent[:, skipped:, output] = 1
            last = output == final.shape[-1] - 1
            gradients = torch.autograd.grad(final, states, cotangent, retain_graph=not last)
            rows = torch.stack([gradient[:, skipped:].sum((0, 1)) for gradient in gradients])
            self.sums[:, output] += rows.double().cpu()
            cotangent[:, skipped:, output] = 0
        self.positions += final[:, skipped:, 0].numel()

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, in each of them."""
        if accelerator.num_processes > 1:
            for part in (self.sums, self.positions):
                part.copy_(accelerator.reduce(part.to(accelerator.device), "sum"))

    @property
    def mean(self) -> Float[Tensor, "layers d_model d_model"]:
        """Rows are dimensions of the final state, columns those of the layer's."""
        return self.sums / self.positions
