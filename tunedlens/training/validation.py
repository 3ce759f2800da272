"""The held-out blocks that a run is validated on, in between and at its end."""

from collections.abc import Mapping
from itertools import islice

import torch
from accelerate import Accelerator

from tunedlens.config import ScoringConfig, TrainConfig
from tunedlens.corpus import CorpusSplits
from tunedlens.distributed import reduce_sums
from tunedlens.engine.objective import LensKL, ModelSide
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation, RatioSums, score_lenses, to_estimates
from tunedlens.fit import LeastSquares
from tunedlens.lenses import Lens, TunedLens
from tunedlens.model import FrozenModel
from tunedlens.training.states import StateReader

_BLOCKS_AT_A_TIME = 8


class HeldOut:
    """Held-out text, for the KL that a run is steered by and for the table it ends with.

    Args:
        model: the frozen model.
        splits: the text.
        config: with nothing left open.
        reader: runs the model on this process's blocks.
        accelerator: adds up the shares of several processes.
        table_tokens: the most positions that the table may have.
    """

    def __init__(
        self,
        model: FrozenModel,
        splits: CorpusSplits,
        config: TrainConfig,
        reader: StateReader,
        accelerator: Accelerator,
        *,
        table_tokens: int,
    ) -> None:
        self._model = model
        self._config = config
        self._reader = reader
        self._accelerator = accelerator
        seq_len, look_tokens = config.corpus.seq_len or 0, config.validation_tokens or 1
        look_blocks = max(1, look_tokens // seq_len)
        needed = max(-(-table_tokens // (seq_len - 1)), look_blocks)
        self._blocks = list(islice(splits.validation.shuffled(), needed))
        self._look_blocks = self._blocks[:look_blocks]
        self._model_sides: list[ModelSide] = []
        if not self._blocks:
            raise InputError(
                f"the held-out side of {config.corpus.dataset} has no block of {seq_len} tokens; "
                "give more text or a smaller --seq-len"
            )

    @property
    def look_tokens(self) -> int:
        """Positions that a run is steered by, in whole blocks."""
        return len(self._look_blocks) * self._reader.positions

    @torch.no_grad()
    def kl(self, lens: TunedLens, objective: LensKL) -> tuple[list[float], float | None]:
        """Mean KL of every layer in nats, and the standard error of their mean.

        Over the whole vocabulary, in the precision of training. The model's side is computed
        once and kept.
        """
        is_first, sums = not self._model_sides, RatioSums(lens.n_layers + 1)
        index = 0
        for batch in torch.stack(self._look_blocks).split(_BLOCKS_AT_A_TIME):
            for states in self._reader.read(batch):
                if is_first:
                    self._model_sides.append(objective.model_side(states[-1]))
                model = self._model_sides[index]
                index += 1
                kl = torch.stack(
                    [
                        objective.kl(lens.transform_hidden(states[layer], layer), model)
                        for layer in range(lens.n_layers)
                    ]
                )
                by_block = kl.cpu().double().unflatten(1, (-1, self._reader.positions)).sum(-1)
                with_mean = torch.cat([by_block, by_block.mean(0, keepdim=True)])
                counts = torch.full((by_block.shape[1],), self._reader.positions)
                sums.add(with_mean[:, None], counts)
        reduce_sums(self._accelerator, sums.moments)
        found = to_estimates(*sums.estimates())
        return [estimate.value for estimate in found[:-1]], found[-1].standard_error

    def least_squares(self, n_layers: int, d_model: int) -> LeastSquares:
        """Sums of the regression, to judge a solution by."""
        sums = LeastSquares(n_layers, d_model)
        for batch in torch.stack(self._blocks).split(_BLOCKS_AT_A_TIME):
            for states in self._reader.read(batch):
                sums.add(states[:-1], states[-1])
        sums.reduce(self._accelerator)
        return sums

    def score(self, lenses: Mapping[str, Lens], tokens: int) -> Evaluation:
        """The table that a run reports, with float32 products, on at most so many positions."""
        return score_lenses(
            self._model,
            lenses,
            self._blocks,
            ScoringConfig(
                tokens=tokens, batch_size=self._config.micro_batch_size or _BLOCKS_AT_A_TIME
            ),
            accelerator=self._accelerator,
        )
