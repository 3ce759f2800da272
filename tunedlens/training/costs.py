"""How much held-out text a run can afford, from counts of floating-point operations.

No clock comes into it, so a run stays a function of its plan.
"""

from dataclasses import dataclass

from tunedlens.config import ONE_PASS, TrainConfig
from tunedlens.errors import InputError
from tunedlens.model import FrozenModel

_VALIDATION_SHARE, _TABLE_SHARE = 0.1, 0.2
"""Of the operations of a run: the most that validation in between, and the table, may take."""
_MOST_VALIDATION_TOKENS, _MOST_TABLE_TOKENS = 8192, 16_384
_LEAST_VALIDATION_BLOCKS, _LEAST_TABLE_BLOCKS = 1, 2
"""Two blocks are the fewest that have a standard error."""
_SLOWNESS_OF_FP32 = 4.0
"""Of a product in float32, against one in bfloat16, on CPUs and GPUs that multiply both."""
_SLOWNESS_OF_FORWARD = 2.0
"""Attention and what lies between the products take about as long as the products."""
_FIRST_LOOKS = (16, 23)
"""In steps; from then on every second look is at twice as many."""


def next_look(looks: list[int]) -> int:
    """The step of the next look, from those of the looks that have been (the first at 0)."""
    if len(looks) <= len(_FIRST_LOOKS):
        return _FIRST_LOOKS[len(looks) - 1]
    return max(looks[-1] + 1, 2 * looks[-2])


def count_looks(steps: int) -> int:
    """Looks in a run of so many steps, with the ones before the first step and at the end."""
    looks = [0]
    while looks[-1] < steps:
        looks.append(min(steps, next_look(looks)))
    return len(looks)


def trained_positions(config: TrainConfig) -> int:
    """Positions of one block that are trained on.

    Raises:
        InputError: there are none.
    """
    seq_len = config.corpus.seq_len
    assert seq_len is not None  # resolve_corpus has set it
    if config.skip_first >= seq_len:
        raise InputError(
            f"--skip-first must be less than --seq-len ({seq_len}), got {config.skip_first}"
        )
    return seq_len - config.skip_first


@dataclass(frozen=True)
class Costs:
    """Operations per token, as they would be in the precision of the products."""

    init_tokens: int
    """Of the first pass."""
    step_tokens: int
    """Of one step."""
    seq_len: int
    first_pass: float
    step: float
    look: float
    table: float

    @classmethod
    def of(cls, config: TrainConfig, model: FrozenModel) -> "Costs":
        """The costs of a config in which batch, precision and sample are settled."""
        step_tokens = (config.batch_size or 1) * trained_positions(config)
        identity = model.identity
        n_layers, d_model, vocab_size = identity.n_layers, identity.d_model, identity.vocab_size
        fp32 = _SLOWNESS_OF_FP32 if config.precision == "bf16" else 1.0
        blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
        forward = 2 * blocks * _SLOWNESS_OF_FORWARD
        product, rows = 2 * d_model * vocab_size, config.vocab_sample or vocab_size
        first_pass = forward + n_layers * 4 * d_model**2 * fp32
        if config.fit == "jacobian":
            first_pass = forward * (1 + 2 * d_model)  # a backward pass for every dimension
        starts = config.fit in ("preconditioned", *ONE_PASS)
        optimizer = 34 * d_model**3 / step_tokens
        return cls(
            init_tokens=(config.init_tokens or 0) if starts else 0,
            step_tokens=step_tokens,
            seq_len=config.corpus.seq_len or 2,
            first_pass=first_pass,
            step=forward
            + 2 * product
            + n_layers * (4 * d_model * rows + 2 * d_model**2 * (1 + fp32) + optimizer),
            look=forward + (n_layers + 2) * product,
            table=forward + 2 * n_layers * product * fp32,
        )

    def validation_tokens(self, tokens: int) -> int:
        """Held-out positions of each look, for a run of at most so many tokens of steps."""
        looks = count_looks(-(-tokens // self.step_tokens))
        affordable = _VALIDATION_SHARE * self._run(tokens) / looks / self.look
        affordable = min(affordable, _MOST_VALIDATION_TOKENS)
        return self.seq_len * max(int(affordable / self.seq_len), _LEAST_VALIDATION_BLOCKS)

    def table_tokens(self, tokens: int) -> int:
        """Held-out positions of the table after a run of so many tokens of steps."""
        affordable = _TABLE_SHARE * self._run(tokens) / self.table
        affordable = min(affordable, _MOST_TABLE_TOKENS)
        positions = self.seq_len - 1
        return positions * max(int(affordable / positions), _LEAST_TABLE_BLOCKS)

    def _run(self, tokens: int) -> float:
        return self.init_tokens * self.first_pass + tokens * self.step
