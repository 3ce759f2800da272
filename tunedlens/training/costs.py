"""How much held-out text a run can afford, from counts of floating-point operations.

No clock is involved, so a run stays a function of its plan.
"""

from dataclasses import dataclass
from typing import Self

from tunedlens.config import ONE_PASS
from tunedlens.model import FrozenModel
from tunedlens.training.plan import TrainPlan

_VALIDATION_FRACTION, _TABLE_FRACTION = 0.1, 0.2
"""The largest fractions of a run's operations for validation and for the table at the end."""
_MAX_VALIDATION_TOKENS, _MAX_TABLE_TOKENS = 8192, 16_384
_MIN_VALIDATION_BLOCKS, _MIN_TABLE_BLOCKS = 1, 2
"""A standard error needs at least two blocks."""
_FP32_COST = 4.0
"""Of a product in float32 relative to bfloat16, on CPUs and GPUs that multiply both."""
_FORWARD_COST = 2.0
"""Of a forward pass relative to its products with parameters alone: attention and elementwise
operations take about as long."""
_FIRST_VALIDATIONS = (16, 23)
"""In steps; after that, the step number doubles with every second validation."""


def next_validation_step(steps: list[int]) -> int:
    """The step of the next validation, from the steps of all earlier ones, the first being 0."""
    if len(steps) <= len(_FIRST_VALIDATIONS):
        return _FIRST_VALIDATIONS[len(steps) - 1]
    return max(steps[-1] + 1, 2 * steps[-2])


def count_validations(steps: int) -> int:
    """Validations in a run of this many steps, including those before the first and at the end."""
    validations = [0]
    while validations[-1] < steps:
        validations.append(min(steps, next_validation_step(validations)))
    return len(validations)


@dataclass(frozen=True)
class Costs:
    """Operations per token, counted as if all were in the precision of the products."""

    plan: TrainPlan
    first_pass: float
    step: float
    validation: float
    table: float

    @classmethod
    def of(cls, plan: TrainPlan, model: FrozenModel) -> Self:
        """The costs of a plan for a model."""
        identity = model.identity
        n_layers, d_model, vocab_size = identity.n_layers, identity.d_model, identity.vocab_size
        fp32 = _FP32_COST if plan.precision == "bf16" else 1.0
        blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
        forward = 2 * blocks * _FORWARD_COST
        product, rows = 2 * d_model * vocab_size, plan.vocab_sample or vocab_size
        first_pass = forward + n_layers * 4 * d_model**2 * fp32
        if plan.fit == "jacobian":
            first_pass = forward * (1 + 2 * d_model)  # a backward pass for every dimension
        optimizer = 34 * d_model**3 / plan.step_tokens
        return cls(
            plan,
            first_pass=first_pass,
            step=forward
            + 2 * product
            + n_layers * (4 * d_model * rows + 2 * d_model**2 * (1 + fp32) + optimizer),
            validation=forward + (n_layers + 2) * product,
            table=forward + 2 * n_layers * product * fp32,
        )

    def validation_tokens(self, tokens: int) -> int:
        """Affordable held-out positions of one validation, if the steps take this many tokens."""
        validations = count_validations(-(-tokens // self.plan.step_tokens))
        affordable = _VALIDATION_FRACTION * self._run(tokens) / validations / self.validation
        affordable = min(affordable, _MAX_VALIDATION_TOKENS)
        seq_len = self.plan.corpus.seq_len
        return seq_len * max(int(affordable / seq_len), _MIN_VALIDATION_BLOCKS)

    def table_tokens(self, tokens: int) -> int:
        """Held-out positions of the table, if the steps take this many tokens.

        The plan's `evaluate_tokens`, or as many as are affordable.
        """
        if self.plan.evaluate_tokens is not None:
            return self.plan.evaluate_tokens
        affordable = _TABLE_FRACTION * self._run(tokens) / self.table
        affordable = min(affordable, _MAX_TABLE_TOKENS)
        positions = self.plan.corpus.seq_len - 1
        return positions * max(int(affordable / positions), _MIN_TABLE_BLOCKS)

    def _run(self, tokens: int) -> float:
        has_first_pass = self.plan.fit in ("preconditioned", *ONE_PASS)
        first_pass = self.plan.init_tokens * self.first_pass if has_first_pass else 0
        return first_pass + tokens * self.step
