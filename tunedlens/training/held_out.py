"""The held-out blocks that a run looks at again and again."""

from collections.abc import Mapping
from itertools import islice

import torch
from accelerate import Accelerator

from tunedlens.config import TrainConfig
from tunedlens.corpus import Corpora, token_bytes
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation, evaluate
from tunedlens.fit import LeastSquares
from tunedlens.frozen import FrozenModel
from tunedlens.lens import Lens, TunedLens
from tunedlens.objective import LensKL
from tunedlens.training.states import StateReader

_BLOCKS_AT_A_TIME = 8
_STEERING_TOKENS = 8192
"""Enough to see a layer stop falling, as it is the same text every time."""


class HeldOut:
    """Held-out text, for the figures that a run is steered by and for those it ends with."""

    def __init__(
        self,
        model: FrozenModel,
        corpora: Corpora,
        config: TrainConfig,
        reader: StateReader,
        accelerator: Accelerator,
    ) -> None:
        self._model = model
        self._config = config
        self._reader = reader
        self._accelerator = accelerator
        assert config.corpus.seq_len is not None  # with_defaults has set it
        needed = -(-config.evaluate_tokens // (config.corpus.seq_len - 1))
        self._blocks = list(islice(corpora.validation.sample(), needed))
        steering = -(-min(config.evaluate_tokens, _STEERING_TOKENS) // config.corpus.seq_len)
        self._steering_blocks = self._blocks[:steering]
        self._token_bytes = token_bytes(model.tokenizer)
        if not self._blocks:
            raise InputError(
                f"the held-out side of {config.corpus.dataset} has no block of "
                f"{config.corpus.seq_len} tokens; give more text or a smaller --seq-len"
            )

    @property
    def steering_tokens(self) -> int:
        """What a run is steered by."""
        return sum(map(len, self._steering_blocks))

    @torch.no_grad()
    def kl(self, lens: TunedLens, objective: LensKL) -> list[float]:
        """Mean KL of every layer in nats, on a part and in the precision of training: quick."""
        sums = torch.zeros(lens.n_layers + 1, device=self._model.device)
        for batch in torch.stack(self._steering_blocks).split(_BLOCKS_AT_A_TIME):
            for states in self._reader.read(batch):
                for chunk in states.split(objective.chunk, dim=1):
                    translated = [
                        lens.transform_hidden(chunk[layer], layer) for layer in range(lens.n_layers)
                    ]
                    count = chunk.shape[1]
                    sums[:-1] += objective(torch.stack(translated), chunk[-1]) * count
                    sums[-1] += count
        if self._accelerator.num_processes > 1:
            sums = self._accelerator.reduce(sums, "sum")
        return (sums[:-1] / sums[-1]).tolist()

    def least_squares(self, n_layers: int, d_model: int) -> LeastSquares:
        """Sums of the regression, to judge a solution by."""
        sums = LeastSquares(n_layers, d_model)
        for batch in torch.stack(self._blocks).split(_BLOCKS_AT_A_TIME):
            for states in self._reader.read(batch):
                sums.add(states[:-1], states[-1])
        sums.reduce(self._accelerator)
        return sums

    def score(self, lenses: Mapping[str, Lens]) -> Evaluation:
        """The figures that a run reports, with float32 products."""
        return evaluate(
            self._model,
            lenses,
            self._blocks,
            self._token_bytes,
            tokens=self._config.evaluate_tokens,
            batch_size=self._config.micro_batch_size or _BLOCKS_AT_A_TIME,
            accelerator=self._accelerator,
        )
