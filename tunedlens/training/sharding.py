"""Divides layers among processes, and sends states to the processes that own them.

Each process runs the model on its blocks of a batch, sends the states of every layer to the
process that owns its translators, and receives those of its own layers from all processes. The
translators, their gradients and the state of the optimizer stay where they are. Only results are
summed: the KL of every layer, and flags.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.lenses import AffineLens
from tunedlens.model import HookPoint

States = Float[Tensor, "tokens d_model"]
Shared = Sequence[Tensor]
"""Further values of the same tokens, which the owners of all layers need."""


def divide(layers: list[int], processes: int) -> list[list[int]]:
    """The layers of each process.

    Raises:
        InputError: there are more processes than layers.
    """
    if processes > len(layers):
        raise InputError(
            f"--shard-layers cannot divide {len(layers)} layers among {processes} processes; "
            "start fewer processes"
        )
    return [layers[process::processes] for process in range(processes)]


class LayerShards:
    """The layers of each process: every n-th layer with n processes, or all layers.

    Args:
        points: the points where the whole lens has translators.
        is_divided: whether the layers are divided. Otherwise every process has all layers, and
            nothing is sent.

    Raises:
        InputError: there are more processes than layers.
    """

    def __init__(
        self,
        points: Sequence[HookPoint],
        d_model: int,
        accelerator: Accelerator,
        *,
        is_divided: bool,
    ) -> None:
        self.is_divided = is_divided and accelerator.num_processes > 1
        self._accelerator, self._count, self._d_model = accelerator, len(points), d_model
        layers, processes = sorted({point.layer for point in points}), accelerator.num_processes
        by_process = divide(layers, processes) if self.is_divided else [layers] * processes
        self._owned = [
            [index for index, point in enumerate(points) if point.layer in layers]
            for layers in by_process
        ]
        self.layers: list[int] = by_process[accelerator.process_index]
        """The layers of this process."""
        self.own: list[int] = self._owned[accelerator.process_index]
        """The indices of its points among all points."""

    def to_owners(
        self, micro_batches: Iterable[tuple[list[States], Shared]], rounds: int, none: Shared
    ) -> Iterator[tuple[list[States], Shared]]:
        """Exchange states: give away those of other layers, and get this process's layers of all.

        Args:
            micro_batches: the states at all points, and further values.
            rounds: the number of micro-batches of the process that has the most.
            none: the further values for an empty set of tokens.
        """
        if not self.is_divided:
            yield from micro_batches
            return
        left = iter(micro_batches)
        no_states = [torch.empty(0, self._d_model, device=self._accelerator.device)] * self._count
        for _ in range(rounds):
            yield self._exchange(*next(left, (no_states, none)))

    def _exchange(self, states: list[States], shared: Shared) -> tuple[list[States], Shared]:
        tokens = self._accelerator.gather(torch.tensor([len(states[0])], device=states[0].device))
        values = [[*(states[index] for index in owned), *shared] for owned in self._owned]
        shapes = [value.shape[1:] for value in values[self._accelerator.process_index]]
        sizes = [math.prod(shape) for shape in shapes]
        to_each = [sum(value.numel() for value in part) for part in values]
        from_each = [count * sum(sizes) for count in tokens.tolist()]
        sent = torch.cat([value.flatten().float() for part in values for value in part])
        received = sent.new_empty(sum(from_each))
        torch.distributed.all_to_all_single(received, sent, from_each, to_each)
        by_process = [
            part.split([count * size for size in sizes])
            for part, count in zip(received.split(from_each), tokens.tolist(), strict=True)
        ]
        gathered = [
            torch.cat(parts).view(-1, *shape)
            for parts, shape in zip(zip(*by_process, strict=True), shapes, strict=True)
        ]
        return gathered[: len(self.own)], gathered[len(self.own) :]

    def expand(self, own: Float[Tensor, "own ..."]) -> Float[Tensor, "points ..."]:
        """Values of this process's points among zeros for those of the others."""
        if not self.is_divided:
            return own
        values = own.new_zeros(self._count, *own.shape[1:])
        values[self.own] = own
        return values

    def collect_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's state of all points, on the CPU of the main process, point by point.

        All processes must call it. The others get nothing.
        """
        if not self.is_divided:
            return dict(state)
        collected = {}
        for name, own in state.items():
            rows = [row.cpu() for row in self._rows(own) if self._accelerator.is_main_process]
            if rows:
                collected[name] = torch.stack(rows)
        return collected

    def own_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a whole state that belongs to this process."""
        if not self.is_divided:
            return dict(state)
        return {name: value[self.own] for name, value in state.items()}

    def collect_lens(self, own: AffineLens, whole: AffineLens) -> AffineLens:
        """The translators of all processes, in every process; `whole` is filled with them."""
        for index, translator in enumerate(whole.all_translators()):
            owner = next(p for p, owned in enumerate(self._owned) if index in owned)
            for name, parameter in translator.named_parameters():
                if index in self.own:
                    mine = own.all_translators()[self.own.index(index)]
                    parameter.data.copy_(mine.get_parameter(name).data)
                torch.distributed.broadcast(parameter.data, owner)
        return whole

    def _rows(self, own: Float[Tensor, "own ..."]) -> Iterator[Float[Tensor, "..."]]:
        """Every point's value in turn, from its owner."""
        for index in range(self._count):
            owner = next(p for p, owned in enumerate(self._owned) if index in owned)
            row = own[self.own.index(index)].clone() if index in self.own else own[0].clone()
            torch.distributed.broadcast(row, owner)
            yield row
