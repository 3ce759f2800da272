"""Reads the states of the residual stream that a run trains on, from blocks of tokens."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.devices import send
from tunedlens.engine.backend import DTYPES
from tunedlens.model import FrozenModel, HookPoint, is_quantised
from tunedlens.training.plan import TrainPlan


class StateReader:
    """Runs the model, each process on its shard of the blocks."""

    def __init__(self, model: FrozenModel, plan: TrainPlan, accelerator: Accelerator) -> None:
        self.model, self.plan, self.accelerator = model, plan, accelerator
        self.dtype, self._is_quantised = DTYPES[plan.precision], is_quantised(model.blocks)
        self.points = plan.points(model.identity.n_layers)
        """Where the states are read, in the order of the lens's translators."""
        self.with_final = [*self.points, HookPoint("resid_pre", model.identity.n_layers)]

    @property
    def no_states(self) -> Float[Tensor, "0 d_model"]:
        """The state of no tokens."""
        return torch.empty(0, self.model.identity.d_model, device=self.model.device)

    def micro_batches(self, input_ids: Int[Tensor, "batch seq"]) -> Sequence[Tensor]:
        """This process's blocks, on the model's device, in micro-batches."""
        shard = input_ids[self.accelerator.process_index :: self.accelerator.num_processes]
        if not len(shard):
            return []
        shard = send(shard, self.model.device)
        return shard.split(self.plan.micro_batch_size or len(shard))

    def rounds(self, blocks: int) -> int:
        """The number of micro-batches of a batch, for the process that has the most."""
        shard = -(-blocks // self.accelerator.num_processes)
        return -(-shard // (self.plan.micro_batch_size or shard))

    def autocast(self) -> torch.autocast:
        """The precision of matrix products while training; quantised ones have their own."""
        enabled = self.dtype != torch.float32 and not self._is_quantised
        return torch.autocast(self.model.device.type, self.dtype, enabled=enabled)

    def read(
        self, input_ids: Int[Tensor, "batch seq"], *, is_held: bool = False
    ) -> Iterator[list[Float[Tensor, "tokens d_model"]]]:
        """The states of this process's blocks and the final one, by micro-batch, in float32.

        They are the model's own tensors if those are float32 and no position is skipped. The
        iteration has to reach its end, where a process with fewer micro-batches lends its weights.

        Args:
            is_held: whether the caller keeps the states of all micro-batches. Then the states of
                each are copied into one tensor. Many small tensors that outlive the forward pass
                would leave gaps in memory that the next pass cannot use.
        """
        batches = self.micro_batches(input_ids)
        for rows in batches:
            yield self._flat_states(rows, is_copied=is_held and len(batches) > 1)
        for _ in range(self.rounds(len(input_ids)) - len(batches)):
            self.model.lend_weights()

    def _flat_states(
        self, rows: Int[Tensor, "batch seq"], *, is_copied: bool
    ) -> list[Float[Tensor, "tokens d_model"]]:
        states = [state[:, self.plan.skip_first :].flatten(0, 1) for state in self.states_of(rows)]
        if is_copied:
            return list(torch.stack([state.float() for state in states]))
        return [state.float() for state in states]

    def states_of(
        self, rows: Int[Tensor, "batch seq"]
    ) -> Sequence[Float[Tensor, "batch seq d_model"]]:
        """The states of one micro-batch and the final one, at every position, in any dtype."""
        with self.autocast():
            return self.model.states_at(self.with_final, rows)

    def summary(self) -> str:
        """Where the states came from, in a line; empty if all came from the model."""
        return ""
