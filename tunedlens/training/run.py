"""What a run consists of: parts that stay the same, and the state that a step changes."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from accelerate import Accelerator

from tunedlens import checkpoint
from tunedlens.config import BASELINES
from tunedlens.corpus import SELF
from tunedlens.engine.capped import make_objective
from tunedlens.files import JsonObject
from tunedlens.fit import LensOptimizer, PreconditionedMuon, TorchOptimizer, ValidationResult
from tunedlens.lenses import AffineLens, TunedLens
from tunedlens.model import FrozenModel, shape_of
from tunedlens.sampling import load_or_sample
from tunedlens.tracking import progress_bar, say
from tunedlens.training.plan import Costs, TrainPlan
from tunedlens.training.state_cache import CachedStateReader, CacheSettings
from tunedlens.training.states import StateReader
from tunedlens.training.validation import ValidationSet


class Run:
    """The parts of a run that stay the same from its first to its last step.

    Args:
        cache: where states are kept, if they are kept.

    Raises:
        InputError: the text cannot be read or is too short, or the cache holds other states.
    """

    def __init__(
        self,
        plan: TrainPlan,
        output: Path,
        model: FrozenModel,
        accelerator: Accelerator,
        cache: CacheSettings | None = None,
    ) -> None:
        self.plan, self.output, self.model, self.accelerator = plan, output, model, accelerator
        self.is_main: bool = accelerator.is_main_process
        """Whether this process is the one that writes files and messages."""
        is_sampled = self.is_main and plan.corpus.dataset == SELF
        with progress_bar(plan.corpus.self_tokens or 0, "sampling text", show=is_sampled) as bar:
            self.splits = load_or_sample(plan.corpus, model, bar.update)
        self.costs = Costs(plan, shape_of(model))
        self.reader = (
            StateReader(model, plan, accelerator)
            if cache is None
            else CachedStateReader(model, plan, accelerator, cache)
        )
        table_tokens = self.costs.table_tokens(plan.budget)
        self.validation_set = ValidationSet(self.splits.validation, self.reader, table_tokens)
        unembedding = model.unembedding.centred()
        self.objective = make_objective(unembedding, dtype=self.reader.dtype, kernel=plan.kernel)

    def new_lens(self) -> TunedLens:
        """The untrained lens."""
        return TunedLens.from_model(self.model, self.plan.all_sites, self.plan.chosen_layers)

    def say(self, message: str) -> None:
        """Print a line, in the main process only."""
        if self.is_main:
            say(message)


@dataclass
class Progress:
    """How far a run has come; JSON-able, and saved with it."""

    step: int = 0
    tokens: int = 0
    """Positions that the steps have trained on."""
    init_tokens: int = 0
    """Positions of the first pass, whose KL is never computed."""
    init_lens: JsonObject | None = None
    """Model and hash of the lens that `--init` names."""
    position: JsonObject | None = None
    """Where the corpus continues."""
    bad_blocks: int = 0
    """Blocks that were left out because their numbers are not finite."""
    ended_early: str | None = None
    """Why the steps could not go on."""
    seconds: float = 0.0
    history: list[ValidationResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = time.monotonic() - self.seconds

    def update_seconds(self) -> float:
        """Bring `seconds`, the time since the run began, up to date."""
        self.seconds = time.monotonic() - self._started
        return self.seconds

    @classmethod
    def from_json(cls, data: JsonObject) -> Self:
        """The inverse of `dataclasses.asdict`."""
        history = [ValidationResult(**result) for result in data["history"]]
        return cls(**data | {"history": history})


class TrainState(NamedTuple):
    """What a step changes."""

    optimizer: LensOptimizer
    progress: Progress

    def best_lens(self) -> AffineLens:
        """The result of the optimizer, with the closed form at layers that are worse than it."""
        history = self.progress.history
        if isinstance(self.optimizer, PreconditionedMuon) and history:
            pairs = zip(history[0].kl_nats, history[-1].kl_nats, strict=True)
            for layer, (first, last) in enumerate(pairs):
                if last > first:
                    self.optimizer.revert(layer)
        return self.optimizer.result()


def initial_state(run: Run) -> TrainState:
    """The state of a new run: the logit lens, or the lens that `--init` names.

    Raises:
        InputError: the named lens cannot be read, or has another shape.
    """
    lens, progress = run.new_lens(), Progress()
    if run.plan.init is not None:
        manifest = checkpoint.fill_lens(lens, Path(run.plan.init), any_model=True)
        progress.init_lens = {name: manifest[name] for name in ("model", "lens_sha256")}
    return TrainState(make_optimizer(lens, run.plan), progress)


def make_optimizer(lens: AffineLens, plan: TrainPlan) -> LensOptimizer:
    """The optimizer of a fit, which starts from a lens."""
    hyperparameters = (plan.lr, plan.momentum, plan.weight_decay)
    if plan.fit in BASELINES:
        return TorchOptimizer(lens, plan.fit, *hyperparameters)
    return PreconditionedMuon(lens, *hyperparameters, rank=plan.low_rank)
