"""The mean Jacobian of the final state with respect to the states of layers."""

import zlib
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.config import JacobianTargets
from tunedlens.devices import send
from tunedlens.distributed import reduce_sums
from tunedlens.model import FrozenModel

SKIPPED_POSITIONS = 16
"""Positions at the start of each block that are neither differentiated nor a target: they are
attention sinks, and their states are unlike all others."""


class MeanJacobian:
    """Streaming mean over source positions p of d final / d state[p] for some layers.

    Every output dimension takes one backward pass per batch, with cotangents at all target
    positions at once. With targets `later`, as published, all cotangents are 1. A source position
    p then gets the sum over p' ≥ p of d final[p'] / d state[p]: the effect of the state on all
    later outputs.

    With targets `same`, the cotangents are random signs, and the gradient at a position is
    multiplied by the sign of that position. Contributions of other positions then have mean 0,
    and d final[p] / d state[p] remains: the effect of the state on the next token, which is
    what the KL at the same position measures.

    Args:
        layers: the layers whose states are differentiated.
        skipped: the number of positions to skip at the start of each block.
        seed: the seed of the random signs, which also depend on the block.

    Source:
        Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in
        Language Models", transformer-circuits.pub/2026/workspace; Hutchinson 1990, "A
        stochastic estimator of the trace", for the signs.
    """

    def __init__(
        self,
        layers: Sequence[int],
        d_model: int,
        *,
        targets: JacobianTargets = "later",
        skipped: int = SKIPPED_POSITIONS,
        seed: int = 0,
    ) -> None:
        self.layers = layers
        self.sums = torch.zeros(len(layers), d_model, d_model, dtype=torch.float64)
        self.positions = torch.zeros((), dtype=torch.float64)
        self._targets, self._skipped = targets, skipped
        self._seed = seed

    def add(self, model: FrozenModel, input_ids: Int[Tensor, "batch seq"]) -> None:
        """Add the source positions of further blocks."""
        *states, final = model.residual_stream(input_ids, differentiable=True)
        states = [states[layer] for layer in self.layers]
        kept = slice(min(self._skipped, input_ids.shape[1] - 1), None)
        signs, cotangent = torch.ones_like(final[:, kept, 0]).float(), torch.zeros_like(final)
        generators = self._generators(input_ids) if self._targets == "same" else []
        by_output = []
        for output in range(final.shape[-1]):
            if generators:
                random = [torch.randint(0, 2, signs.shape[1:], generator=g) for g in generators]
                signs = send(2 * torch.stack(random) - 1, signs.device).to(signs)
            cotangent.zero_()
            cotangent[:, kept, output] = signs.to(cotangent)
            is_last = output == final.shape[-1] - 1
            gradients = torch.autograd.grad(final, states, cotangent, retain_graph=not is_last)
            rows = []
            for gradient in gradients:  # they may be on several devices
                weights = signs[..., None].to(gradient.device)
                rows.append((gradient[:, kept].float() * weights).sum((0, 1)).to(final.device))
            by_output.append(torch.stack(rows))
        self.sums += torch.stack(by_output, 1).double().cpu()
        self.positions += signs.numel()

    def _generators(self, input_ids: Int[Tensor, "batch seq"]) -> list[torch.Generator]:
        """Random numbers for each block that depend on its tokens alone, not on the batch."""
        hashes = [zlib.crc32(block.int().numpy()) for block in input_ids.cpu()]
        return [torch.Generator().manual_seed(self._seed + number) for number in hashes]

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes; every process gets the totals."""
        reduce_sums(accelerator, self.sums, self.positions)

    @property
    def mean(self) -> Float[Tensor, "layers d_model d_model"]:
        """Rows are dimensions of the final state, columns are dimensions of the layer's state."""
        return self.sums / self.positions
