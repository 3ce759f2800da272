"""The held-out blocks of a run."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.config import ScoringConfig
from tunedlens.corpus import Corpus
from tunedlens.distributed import reduce_sums
from tunedlens.engine.objective import LensKL, ModelSide
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation, RatioSums, score_lenses
from tunedlens.fit import LeastSquares
from tunedlens.lenses import Lens, ResidualLens
from tunedlens.progress import say
from tunedlens.training.sharding import LayerShards
from tunedlens.training.states import StateReader

BLOCKS_AT_A_TIME = 8


class ValidationSet:
    """Held-out text for the validations during a run and for the table at its end.

    Args:
        table_tokens: the largest number of positions for the table.

    Raises:
        InputError: the text has no block.
    """

    def __init__(
        self, corpus: Corpus, reader: StateReader, table_tokens: int, shards: LayerShards
    ) -> None:
        self._reader, self._plan, self._shards = reader, reader.plan, shards
        seq_len = self._plan.corpus.seq_len
        count = max(1, self._plan.validation_tokens // seq_len)
        needed = max(-(-table_tokens // (seq_len - 1)), count)
        self._blocks = list(islice(corpus.shuffled(), needed))
        if not self._blocks:
            raise InputError(
                f"the held-out side of {self._plan.corpus.dataset} has no block of {seq_len} "
                "tokens; give more text or a smaller --seq-len"
            )
        self._validation_blocks = self._blocks[:count]
        self._model_sides: list[ModelSide] = []
        self.seconds = 0.0
        """How long the last validation took."""

    @property
    def tokens(self) -> int:
        """Positions of one validation, in whole blocks."""
        return len(self._validation_blocks) * self._plan.positions

    @property
    def table_positions(self) -> int:
        """The number of positions that the table can have."""
        return len(self._blocks) * (self._plan.corpus.seq_len - 1)

    @torch.no_grad()
    def kl(self, lens: ResidualLens, objective: LensKL) -> tuple[list[float], float | None]:
        """Mean KL of every layer in nats, and the standard error of their mean.

        Computed over the whole vocabulary, in the precision of training. The model's side is
        computed once and kept.
        """
        result = self._kl(lens, objective)
        if not all(map(math.isfinite, result[0])) and self._leave_out_bad_blocks():
            result = self._kl(lens, objective)
        return result

    def _kl(self, lens: ResidualLens, objective: LensKL) -> tuple[list[float], float | None]:
        start, positions = time.monotonic(), self._plan.positions
        shards, accelerator = self._shards, self._reader.accelerator
        own = [self._reader.points[index] for index in shards.own]
        sums = RatioSums(len(self._reader.points) + 1)
        kept, self._model_sides = iter(self._model_sides), []

        def with_side(states: list[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
            self._model_sides.append(next(kept, None) or objective.model_side(states[-1]))
            return states[:-1], self._model_sides[-1]

        none = ModelSide.of_no_tokens(lens.identity.d_model, self._reader.model.device)
        for states, shared in self._to_owners(self._validation_blocks, with_side, none):
            model = ModelSide(*shared)
            kl = torch.stack(
                [
                    objective.kl(lens.transform_hidden(state, layer, site), model)
                    for (site, layer), state in zip(own, states, strict=True)
                ]
            )
            by_block = shards.expand(kl.cpu().double().unflatten(1, (-1, positions)).sum(-1))
            if shards.is_divided:
                reduce_sums(accelerator, by_block)
            with_mean = torch.cat([by_block, by_block.mean(0, keepdim=True)])
            sums.add(with_mean[:, None], torch.full((by_block.shape[1],), positions))
        if not shards.is_divided:
            sums.reduce(accelerator)
        self.seconds = time.monotonic() - start
        *layers, mean = sums.estimates().to_list()
        return [estimate.value for estimate in layers], mean.standard_error

    def least_squares(self) -> LeastSquares:
        """The sums of the regression on held-out text, on which the ridge is chosen."""
        sums = self._least_squares()
        # A process has the sums of its own layers, but all leave out the same blocks.
        is_bad = (~sums.sums().squares.isfinite()).any().int()
        reduce_sums(self._reader.accelerator, is_bad)
        if is_bad and self._leave_out_bad_blocks():
            sums = self._least_squares()
        return sums

    def _least_squares(self) -> LeastSquares:
        d_model = self._reader.model.identity.d_model
        sums = LeastSquares(len(self._shards.own), d_model)

        def with_final(states: list[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
            return states[:-1], states[-1:]

        none = (self._reader.no_states,)
        for states, (final,) in self._to_owners(self._blocks, with_final, none):
            sums.add(states, final)
        if not self._shards.is_divided:
            sums.reduce(self._reader.accelerator)
        return sums

    def score(self, lenses: Mapping[str, Lens], tokens: int) -> Evaluation:
        """The table at the end of a run, with float32 products, on at most this many positions."""
        batch_size = self._plan.micro_batch_size or BLOCKS_AT_A_TIME
        config = ScoringConfig(tokens=tokens, batch_size=batch_size)
        model, accelerator = self._reader.model, self._reader.accelerator
        try:
            return score_lenses(model, lenses, self._blocks, config, accelerator=accelerator)
        except InputError:  # a metric is not finite
            if not self._leave_out_bad_blocks():
                raise
        return score_lenses(model, lenses, self._blocks, config, accelerator=accelerator)

    def _leave_out_bad_blocks(self) -> bool:
        """Drop the blocks whose states are not finite; returns whether there were any.

        Raises:
            InputError: no block is left.
        """
        # Every process looks at all blocks, so each gets a copy of the one that is read.
        copies = self._reader.accelerator.num_processes

        def is_finite(block: Int[Tensor, " seq"]) -> bool:
            (states,) = self._reader.read(block.expand(copies, -1))
            return bool(states[-1].isfinite().all())

        count, validated = len(self._blocks), len(self._validation_blocks)
        is_bad = torch.tensor([int(not is_finite(block)) for block in self._blocks])
        reduce_sums(self._reader.accelerator, is_bad)
        self._blocks = [b for b, bad in zip(self._blocks, is_bad.tolist(), strict=True) if not bad]
        self._validation_blocks = self._blocks[:validated]
        self._model_sides.clear()
        bad = f"{count - len(self._blocks)} of {count} held-out blocks"
        if not self._blocks:
            raise InputError(
                f"{bad} have states that are not finite; try another --dtype than "
                f"{self._plan.model.dtype}"
            )
        if len(self._blocks) < count and self._reader.accelerator.is_main_process:
            say(f"{bad} are left out, because their states are not finite")
        return len(self._blocks) < count

    def _to_owners(
        self,
        blocks: Sequence[Int[Tensor, " seq"]],
        with_shared: Callable[[list[Tensor]], tuple[list[Tensor], Sequence[Tensor]]],
        none: Sequence[Tensor],
    ) -> Iterator[tuple[list[Float[Tensor, "tokens d_model"]], Sequence[Tensor]]]:
        """The states of the blocks, at the layers of this process; see `LayerShards.to_owners`.

        Args:
            with_shared: from the states of a micro-batch to those at all points and further values.
        """
        for batch in torch.stack(list(blocks)).split(BLOCKS_AT_A_TIME):
            local = map(with_shared, self._reader.read(batch))
            yield from self._shards.to_owners(local, self._reader.rounds(len(batch)), none)
