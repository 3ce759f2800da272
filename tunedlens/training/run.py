"""A run: the parts that stay the same, and the state that a step changes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from accelerate import Accelerator

from tunedlens import checkpoint
from tunedlens.config import BASELINES
from tunedlens.corpus import SELF, Batch
from tunedlens.engine.backend import DTYPES
from tunedlens.engine.capped import make_objective
from tunedlens.files import JsonObject, as_type
from tunedlens.fit import LensOptimizer, PreconditionedMuon, TorchOptimizer, ValidationResult
from tunedlens.lenses import AffineLens, TunedLens
from tunedlens.model import FrozenModel, shape_of
from tunedlens.progress import progress_bar, say
from tunedlens.sampling import load_or_sample
from tunedlens.training.plan import Costs, TrainPlan
from tunedlens.training.sharding import LayerShards
from tunedlens.training.state_cache import CachedStateReader, CacheSettings
from tunedlens.training.states import StateReader
from tunedlens.training.validation import ValidationSet


class Run:
    """The parts of a run that stay the same from its first to its last step.

    Args:
        cache: where states are stored; by default they are not stored.

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
        """Whether this process writes files and messages."""
        is_sampled = self.is_main and plan.corpus.dataset == SELF
        with progress_bar(plan.corpus.self_tokens or 0, "sampling text", show=is_sampled) as bar:
            self.splits = load_or_sample(plan.corpus, model, bar.update)
        self.costs = Costs(plan, shape_of(model))
        self.reader = (
            StateReader(model, plan, accelerator)
            if cache is None
            else CachedStateReader(model, plan, accelerator, cache)
        )
        self.shards = LayerShards(
            self.reader.points,
            model.identity.d_model,
            accelerator,
            is_divided=bool(plan.shard_layers),
        )
        table_tokens = self.costs.table_tokens(plan.budget)
        self.validation_set = ValidationSet(
            self.splits.validation, self.reader, table_tokens, self.shards
        )
        unembedding = model.unembedding.centred()
        self.objective = make_objective(unembedding, dtype=self.reader.dtype, kernel=plan.kernel)

    def new_lens(self) -> TunedLens:
        """The untrained lens, with the layers that this process trains."""
        return TunedLens.from_model(self.model, self.plan.all_sites, self.shards.layers)

    def fill_lens(self, lens: AffineLens, folder: Path, *, any_model: bool = False) -> JsonObject:
        """Fill a lens of `new_lens` with saved translators; returns their manifest."""
        if not self.shards.is_divided:
            return checkpoint.fill_lens(lens, folder, any_model=any_model)
        whole = TunedLens.from_model(self.model, self.plan.all_sites, self.plan.chosen_layers)
        manifest = checkpoint.fill_lens(whole, folder, any_model=any_model)
        lens.load_state_dict(whole.state_dict(), strict=False)
        return manifest

    def whole_lens(self, lens: AffineLens) -> AffineLens:
        """The lens with the layers of all processes, in each of them."""
        if not self.shards.is_divided:
            return lens
        shape = (lens.sites, self.plan.chosen_layers, lens.rank)
        return self.shards.collect_lens(lens, type(lens)(lens.unembedding, lens.identity, *shape))

    def batches(self, position: JsonObject | None = None) -> Iterator[Batch]:
        """The batches to train on, from the start or from the position after a batch."""
        plan = self.plan
        return self.splits.train.batches(plan.batch_size, plan.seed, position, plan.shuffle_window)

    def say(self, message: str) -> None:
        """Print a line, in the main process only."""
        if self.is_main:
            say(message)


@dataclass
class Progress:
    """The progress of a run, which is saved with it. It can be written as JSON."""

    step: int = 0
    tokens: int = 0
    """Positions that the steps have trained on."""
    init_tokens: int = 0
    """Positions of the first pass, whose KL is never computed."""
    init_lens: JsonObject | None = None
    """Model and hash of the lens that `--init` names."""
    position: JsonObject | None = None
    """The position from which the corpus continues."""
    bad_blocks: int = 0
    """Blocks that were left out because their numbers are not finite."""
    ended_early: str | None = None
    """The reason why the steps ended early."""
    seconds: float = 0.0
    history: list[ValidationResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = time.monotonic() - self.seconds

    def update_seconds(self) -> float:
        """Bring `seconds`, the time since the run began, up to date."""
        self.seconds = time.monotonic() - self._started
        return self.seconds

    @classmethod
    def from_json(cls, data: JsonObject, what: str) -> Self:
        """The inverse of `dataclasses.asdict`.

        Args:
            what: the name of the data in messages.

        Raises:
            InputError: a value is missing, not known or of another type.
        """
        return as_type(cls, data, what)


class TrainState(NamedTuple):
    """The state that a step changes."""

    optimizer: LensOptimizer
    progress: Progress

    def best_lens(self, own: Sequence[int]) -> AffineLens:
        """The result of the optimizer, with the closed form at the layers where that is better.

        Args:
            own: the indices of the optimizer's points among all points.
        """
        history = self.progress.history
        if isinstance(self.optimizer, PreconditionedMuon) and history:
            for layer, index in enumerate(own):
                if history[-1].kl_nats[index] > history[0].kl_nats[index]:
                    self.optimizer.revert(layer)
        return self.optimizer.result()


def initial_state(run: Run) -> TrainState:
    """The state of a new run: the logit lens, or the lens that `--init` names.

    Raises:
        InputError: the named lens cannot be read, or has another shape.
    """
    lens, progress = run.new_lens(), Progress()
    if run.plan.init is not None:
        manifest = run.fill_lens(lens, Path(run.plan.init), any_model=True)
        progress.init_lens = {name: manifest[name] for name in ("model", "lens_sha256")}
    return TrainState(make_optimizer(lens, run.plan), progress)


def make_optimizer(lens: AffineLens, plan: TrainPlan) -> LensOptimizer:
    """The optimizer of a fit, which starts from a lens."""
    hyperparameters = (plan.lr, plan.momentum, plan.weight_decay)
    if plan.fit in BASELINES:
        return TorchOptimizer(lens, plan.fit, *hyperparameters)
    dtype = DTYPES[plan.precision]
    return PreconditionedMuon(lens, *hyperparameters, dtype=dtype, rank=plan.low_rank)
