"""The plan of a run: its config with every setting chosen, and the held-out text it can afford.

Costs are counts of floating-point operations. No clock is involved, so a run stays a function of
its plan.
"""

from dataclasses import dataclass

from tunedlens.config import BASELINES, ONE_PASS, Kernel, Precision, TrainConfig
from tunedlens.corpus import ResolvedCorpus
from tunedlens.model import TRANSLATED_SITES, HookPoint, ModelShape, hook_points

_VALIDATION_FRACTION, _TABLE_FRACTION = 0.1, 0.2
"""The largest fractions of a run's operations for validation and for the table at the end."""
_MAX_VALIDATION_TOKENS, _MAX_TABLE_TOKENS = 8192, 16_384
_MIN_VALIDATION_BLOCKS, _MIN_TABLE_BLOCKS = 1, 2
"""A standard error needs at least two blocks."""
_FP32_COST = 4.0
"""The cost of a product in float32 relative to bfloat16, on CPUs and GPUs that support both."""
_FORWARD_COST = 2.0
"""The cost of a forward pass relative to its products with parameters: attention and elementwise
operations take about as long as these."""
_FIRST_VALIDATIONS = (16, 23)
"""The steps of the first validations; then the step number doubles with every second validation."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan(TrainConfig):
    """A config in which all settings are chosen for one model and one device; see `resolve`.

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
        """The largest number of tokens for the steps."""
        return 0 if self.fit in ONE_PASS else self.tokens or self.max_tokens

    @property
    def all_sites(self) -> tuple[str, ...]:
        """The sites that have translators, in the order in which a block computes them."""
        wanted = ("resid_pre", *self.further_sites)
        return tuple(site for site in TRANSLATED_SITES if site in wanted)

    def points(self, n_layers: int) -> tuple[HookPoint, ...]:
        """The points at which the lens of a model with this many layers has translators."""
        layers = self.chosen_layers
        return hook_points(self.all_sites, range(n_layers) if layers is None else layers)

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
        """The largest number of steps that the budget allows."""
        return -(-self.budget // self.step_tokens)


def next_validation_step(steps: list[int]) -> int:
    """The step of the next validation, given the steps of all earlier ones; the first is 0."""
    if len(steps) <= len(_FIRST_VALIDATIONS):
        return _FIRST_VALIDATIONS[len(steps) - 1]
    return max(steps[-1] + 1, 2 * steps[-2])


def count_validations(steps: int) -> int:
    """Validations in a run of this many steps, including those before the first and at the end."""
    validations = [0]
    while validations[-1] < steps:
        validations.append(min(steps, next_validation_step(validations)))
    return len(validations)


class Costs:
    """Operations per token, counted as if all were in the precision of the products."""

    def __init__(self, plan: TrainPlan, shape: ModelShape) -> None:
        self.plan = plan
        n_points, d_model = len(plan.points(shape.n_layers)), shape.d_model
        fp32 = _FP32_COST if plan.precision == "bf16" else 1.0
        self.forward: float = 2 * shape.block_weights * _FORWARD_COST
        forward, product = self.forward, 2 * d_model * shape.vocab_size
        rows = plan.vocab_sample or shape.vocab_size
        self.first_pass: float = forward + n_points * 4 * d_model**2 * fp32
        if plan.fit == "jacobian":
            self.first_pass = forward * (1 + 2 * d_model)  # a backward pass for every dimension
        self.optimizer: float = n_points * 34 * d_model**3 / plan.step_tokens
        layer = 4 * d_model * rows + 2 * d_model**2 * (1 + fp32)
        self.step: float = forward + 2 * product + n_points * layer + self.optimizer
        self.validation: float = forward + (n_points + 2) * product
        self.table: float = forward + 2 * n_points * product * fp32

    def validation_tokens(self, tokens: int) -> int:
        """Affordable held-out positions of one validation, if the steps take this many tokens."""
        validations = count_validations(-(-tokens // self.plan.step_tokens))
        affordable = _VALIDATION_FRACTION * self.fit(tokens) / validations / self.validation
        affordable = min(affordable, _MAX_VALIDATION_TOKENS)
        seq_len = self.plan.corpus.seq_len
        return seq_len * max(int(affordable / seq_len), _MIN_VALIDATION_BLOCKS)

    def table_tokens(self, tokens: int) -> int:
        """The plan's `evaluate_tokens`, or affordable positions of the table at the end."""
        if self.plan.evaluate_tokens is not None:
            return self.plan.evaluate_tokens
        affordable = _TABLE_FRACTION * self.fit(tokens) / self.table
        affordable = min(affordable, _MAX_TABLE_TOKENS)
        positions = self.plan.corpus.seq_len - 1
        return positions * max(int(affordable / positions), _MIN_TABLE_BLOCKS)

    def fit(self, tokens: int) -> float:
        """Operations of the first pass and of steps that take this many tokens."""
        init_tokens = 0 if self.plan.fit in BASELINES else self.plan.init_tokens
        return init_tokens * self.first_pass + tokens * self.step

    def run(self, tokens: int) -> float:
        """Operations of a whole run, with validation and the table at the end."""
        steps = -(-tokens // self.plan.step_tokens)
        validation = count_validations(steps) * self.plan.validation_tokens * self.validation
        held_out = validation * (tokens > 0) + self.table_tokens(tokens) * self.table
        return self.fit(tokens) + held_out
