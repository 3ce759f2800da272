"""A training config with nothing left open."""

from dataclasses import dataclass

from tunedlens.config import ONE_PASS, Kernel, Precision, TrainConfig
from tunedlens.corpus import ResolvedCorpus


@dataclass(frozen=True, kw_only=True)
class TrainPlan(TrainConfig):
    """What a run does, for one model and one device; `resolve` makes it from a `TrainConfig`.

    Four fields may still be None, with a meaning of their own: `tokens` (no budget: the run ends
    when held-out KL has converged), `ridge` (chosen on held-out text), `micro_batch_size` (a
    whole step at once) and `evaluate_tokens` (chosen when the length of the run is known).
    """

    corpus: ResolvedCorpus
    max_tokens: int
    init_tokens: int
    batch_size: int
    precision: Precision
    kernel: Kernel
    vocab_sample: int
    lr: float
    momentum: float
    weight_decay: float
    validation_tokens: int

    @property
    def budget(self) -> int:
        """The most tokens that the steps may take."""
        return 0 if self.fit in ONE_PASS else self.tokens or self.max_tokens

    @property
    def positions(self) -> int:
        """Positions of one block that are trained on."""
        return self.corpus.seq_len - self.skip_first

    @property
    def step_tokens(self) -> int:
        """Positions of one step, over all processes."""
        return self.batch_size * self.positions

    @property
    def steps(self) -> int:
        """The most steps that the budget allows."""
        return -(-self.budget // self.step_tokens)
