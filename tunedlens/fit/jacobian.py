"""The mean Jacobian of the final state in every layer's state, by backward passes."""

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.config import JacobianTargets
from tunedlens.distributed import reduce_sums
from tunedlens.model import FrozenModel

SKIPPED_POSITIONS = 16
"""At the start of each block: the first positions are attention sinks with states unlike all
others, so they are neither differentiated nor a target."""


class MeanJacobian:
    """Streaming mean, over source positions, of d final / d state of every layer.

    Every output dimension takes one backward pass for a whole batch, with a cotangent at
    every target position at once. The first positions of a block are left out.

    With targets `later`, as published, all cotangents are 1: a source position p gets the sum
    over p' >= p of d final[p'] / d state[p], what the state does to all that the model goes on
    to say (causality leaves out p' < p).

    With targets `same` they are random signs, and what comes back to a position is multiplied
    by its own sign: what crosses from other positions then has mean 0, and d final[p] /
    d state[p] is left, what the state does to the next token. That is what a KL to the model
    at the same position asks for.

    Args:
        n_layers: number of states to differentiate.
        d_model: their width.
        targets: later or same.
        skipped: positions at the start of each block.
        seed: of the signs.

    Source:
        Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in
        Language Models", transformer-circuits.pub/2026/workspace; Hutchinson 1990, "A
        stochastic estimator of the trace", for the signs.
    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        *,
        targets: JacobianTargets = "later",
        skipped: int = SKIPPED_POSITIONS,
        seed: int = 0,
    ) -> None:
        self.sums = torch.zeros(n_layers, d_model, d_model, dtype=torch.float64)
        self.positions = torch.zeros((), dtype=torch.float64)
        self._targets, self._skipped = targets, skipped
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, model: FrozenModel, input_ids: Int[Tensor, "batch seq"]) -> None:
        """Count the source positions of further blocks."""
        *states, final = model.residual_stream(input_ids, differentiable=True)
        kept = slice(min(self._skipped, input_ids.shape[1] - 1), None)
        signs = torch.ones_like(final[:, kept, :1], dtype=torch.float32)
        cotangent = torch.zeros_like(final)
        for output in range(final.shape[-1]):
            if self._targets == "same":
                random = torch.randint(0, 2, signs.shape, generator=self._generator)
                signs = (2 * random - 1).to(signs)
            cotangent.zero_()
            cotangent[:, kept, output] = signs[..., 0].to(cotangent)
            is_last = output == final.shape[-1] - 1
            gradients = torch.autograd.grad(final, states, cotangent, retain_graph=not is_last)
            rows = [(gradient[:, kept].float() * signs).sum((0, 1)) for gradient in gradients]
            self.sums[:, output] += torch.stack(rows).double().cpu()
        self.positions += signs.numel()

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, in each of them."""
        reduce_sums(accelerator, self.sums, self.positions)

    @property
    def mean(self) -> Float[Tensor, "layers d_model d_model"]:
        """Rows are dimensions of the final state, columns those of the layer's."""
        return self.sums / self.positions
