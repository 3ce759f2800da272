"""What a run consists of: parts that stay the same, and the state that a step changes."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from accelerate import Accelerator

from tunedlens.config import ONE_PASS
from tunedlens.corpus import CorpusSplits, load_splits
from tunedlens.engine.capped import make_objective
from tunedlens.engine.objective import LensKL
from tunedlens.files import JsonObject
from tunedlens.fit import LensOptimizer, PreconditionedMuon, TorchOptimizer, ValidationResult
from tunedlens.lenses import TunedLens
from tunedlens.model import FrozenModel
from tunedlens.training.costs import Costs
from tunedlens.training.plan import TrainPlan
from tunedlens.training.states import StateReader
from tunedlens.training.validation import ValidationSet


@dataclass(frozen=True)
class Run:
    """The parts of a run that stay the same from its first to its last step."""

    plan: TrainPlan
    output: Path
    model: FrozenModel
    splits: CorpusSplits
    accelerator: Accelerator
    costs: Costs
    reader: StateReader
    validation_set: ValidationSet
    objective: LensKL

    @classmethod
    def of(
        cls, plan: TrainPlan, output: Path, model: FrozenModel, accelerator: Accelerator
    ) -> Self:
        """Read the text and build every part.

        Raises:
            InputError: the text cannot be read or is too short.
        """
        splits = load_splits(plan.corpus, model.tokenizer)
        costs, reader = Costs.of(plan, model), StateReader(model, plan, accelerator)
        most = costs.table_tokens(plan.budget)
        validation_set = ValidationSet(model, splits, plan, reader, accelerator, table_tokens=most)
        unembedding = model.unembedding.centred()
        objective = make_objective(unembedding, dtype=reader.dtype, kernel=plan.kernel)
        parts = (splits, accelerator, costs, reader, validation_set, objective)
        return cls(plan, output, model, *parts)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and messages."""
        return self.accelerator.is_main_process


@dataclass
class Progress:
    """How far a run has come; JSON-able, and saved with it."""

    step: int = 0
    tokens: int = 0
    """Positions that the steps have trained on."""
    init_tokens: int = 0
    """Positions of the first pass, whose KL is never computed."""
    position: JsonObject | None = None
    """Where the corpus continues."""
    seconds: float = 0.0
    history: list[ValidationResult] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: JsonObject) -> Self:
        """The inverse of `dataclasses.asdict`."""
        history = [ValidationResult(**result) for result in data["history"]]
        return cls(**data | {"history": history})


class TrainState:
    """What a step changes."""

    def __init__(self, optimizer: LensOptimizer, progress: Progress | None = None) -> None:
        self.optimizer = optimizer
        self.progress = progress or Progress()
        self._started = time.monotonic() - self.progress.seconds

    def update_seconds(self) -> float:
        """Bring `progress.seconds`, the time since the run began, up to date."""
        self.progress.seconds = time.monotonic() - self._started
        return self.progress.seconds


def make_optimizer(lens: TunedLens, plan: TrainPlan) -> LensOptimizer:
    """The optimizer of a fit, which starts from a lens."""
    hyperparameters = (plan.lr, plan.momentum, plan.weight_decay)
    if plan.fit in ("preconditioned", *ONE_PASS):
        return PreconditionedMuon(lens, *hyperparameters)
    return TorchOptimizer(lens, plan.fit, *hyperparameters)
