"""The held-out blocks of a run."""

import time
from collections.abc import Mapping
from itertools import islice

import torch
from accelerate import Accelerator

from tunedlens.config import ScoringConfig
from tunedlens.corpus import CorpusSplits
from tunedlens.engine.objective import LensKL, ModelSide
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation, RatioSums, score_lenses
from tunedlens.fit import LeastSquares
from tunedlens.lenses import Lens, TunedLens
from tunedlens.model import FrozenModel
from tunedlens.training.plan import TrainPlan
from tunedlens.training.states import StateReader

_BLOCKS_AT_A_TIME = 8


class ValidationSet:
    """Held-out text: for validation while a run goes on, and for the table at its end.

    Args:
        reader: runs the model on this process's blocks.
        accelerator: adds up the sums of all processes.
        table_tokens: the most positions that the table may have.
    """

    def __init__(
        self,
        model: FrozenModel,
        splits: CorpusSplits,
        plan: TrainPlan,
        reader: StateReader,
        accelerator: Accelerator,
        *,
        table_tokens: int,
    ) -> None:
        self._model = model
        self._plan = plan
        self._reader = reader
        self._accelerator = accelerator
        seq_len = plan.corpus.seq_len
        count = max(1, plan.validation_tokens // seq_len)
        needed = max(-(-table_tokens // (seq_len - 1)), count)
        self._blocks = list(islice(splits.validation.shuffled(), needed))
        self._validation_blocks = self._blocks[:count]
        self._model_sides: list[ModelSide] = []
        self.seconds = 0.0
        """How long the last validation took."""
        if not self._blocks:
            raise InputError(
                f"the held-out side of {plan.corpus.dataset} has no block of {seq_len} tokens; "
                "give more text or a smaller --seq-len"
            )

    @property
    def tokens(self) -> int:
        """Positions of one validation, in whole blocks."""
        return len(self._validation_blocks) * self._plan.positions

    @torch.no_grad()
    def kl(self, lens: TunedLens, objective: LensKL) -> tuple[list[float], float | None]:
        """Mean KL of every layer in nats, and the standard error of their mean.

        Computed over the whole vocabulary, in the precision of training. The model's side is
        computed once and kept.
        """
        start = time.monotonic()
        is_first, sums = not self._model_sides, RatioSums(lens.n_layers + 1)
        index = 0
        for batch in torch.stack(self._validation_blocks).split(_BLOCKS_AT_A_TIME):
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
                by_block = kl.cpu().double().unflatten(1, (-1, self._plan.positions)).sum(-1)
                with_mean = torch.cat([by_block, by_block.mean(0, keepdim=True)])
                counts = torch.full((by_block.shape[1],), self._plan.positions)
                sums.add(with_mean[:, None], counts)
        sums.reduce(self._accelerator)
        self.seconds = time.monotonic() - start
        *layers, mean = sums.estimates().to_list()
        return [estimate.value for estimate in layers], mean.standard_error

    def least_squares(self) -> LeastSquares:
        """The sums of the regression on held-out text, on which the ridge is chosen."""
        sums = LeastSquares(self._model.identity.n_layers, self._model.identity.d_model)
        for batch in torch.stack(self._blocks).split(_BLOCKS_AT_A_TIME):
            for states in self._reader.read(batch):
                sums.add(states[:-1], states[-1])
        sums.reduce(self._accelerator)
        return sums

    def score(self, lenses: Mapping[str, Lens], tokens: int) -> Evaluation:
        """The table at the end of a run, with float32 products, on at most this many positions."""
        return score_lenses(
            self._model,
            lenses,
            self._blocks,
            ScoringConfig(
                tokens=tokens, batch_size=self._plan.micro_batch_size or _BLOCKS_AT_A_TIME
            ),
            accelerator=self._accelerator,
        )
