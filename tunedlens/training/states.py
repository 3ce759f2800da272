"""Blocks of tokens to states of the residual stream, as a run asks for them."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.config import TrainConfig
from tunedlens.engine.backend import DTYPES
from tunedlens.model import FrozenModel
from tunedlens.training.costs import trained_positions


class StateReader:
    """Runs the model, each process on its share of the blocks.

    Args:
        model: the frozen model.
        config: precision, micro-batch, positions left out; nothing left open.
        accelerator: which process this is.
    """

    def __init__(self, model: FrozenModel, config: TrainConfig, accelerator: Accelerator) -> None:
        self.dtype = DTYPES[config.precision or "fp32"]
        self._model, self._config, self._accelerator = model, config, accelerator

    @property
    def positions(self) -> int:
        """Positions of one block that take part."""
        return trained_positions(self._config)

    def share(self, input_ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "share seq"]:
        """This process's blocks, on the model's device."""
        mine = input_ids[self._accelerator.process_index :: self._accelerator.num_processes]
        return mine.to(self._model.device)

    def autocast(self) -> torch.autocast:
        """The precision of matrix products while training."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self._model.device.type, self.dtype, enabled=enabled)

    def read(
        self, input_ids: Int[Tensor, "batch seq"]
    ) -> Iterator[list[Float[Tensor, "tokens d_model"]]]:
        """All states of this process's blocks, a micro-batch at a time, in float32.

        They are the model's own tensors where it has them in float32 and no position is left
        out.
        """
        skipped, mine = self._config.skip_first, self.share(input_ids)
        if not len(mine):
            return
        for rows in mine.split(self._config.micro_batch_size or len(mine)):
            with self.autocast():
                states = self._model.residual_stream(rows)
            yield [state[:, skipped:].flatten(0, 1).float() for state in states]
