"""The config of an evaluation."""

import dataclasses
from dataclasses import dataclass
from pathlib import PurePath

from tunedlens.config.base import Config, MetricSet, Split, option
from tunedlens.config.inputs import CorpusConfig, ModelConfig


@dataclass(frozen=True)
class ScoringConfig(Config):
    """How many positions are scored, and which metrics are computed."""

    tokens: int | None = option(
        None, "number of positions to score (default: 65,536, or all if the text has fewer)"
    )
    metrics: MetricSet = option(
        "standard",
        "all adds the reverse KL, Jensen-Shannon, ranks, confidence and calibration",
    )
    by_position: bool = option(False, "also compute every metric by position in the block")
    transfer: bool = option(
        False,
        "also apply every layer's translator at every other layer; this multiplies the work by "
        "the number of layers",
    )
    batch_size: int = option(8, "blocks in one forward pass; changes memory, not results")


@dataclass(frozen=True)
class EvaluateConfig(ScoringConfig):
    """The lenses to evaluate, and the model and text to evaluate them on.

    Settings of `model` and `corpus` that have their default values are replaced by those that the
    first saved lens was trained with, as long as its own model and text are used.
    """

    lenses: tuple[str, ...] = ()
    """Folders of saved lenses, names on the hub, `unigram` or `mean`, each with an optional prefix
    `NAME=`. The logit lens is always added. If empty, the newest saved lens is evaluated."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    beside: str | None = option(
        None,
        "second model of the same shape, such as a fine-tuned one, or folder of a PEFT adapter for "
        "the first model; the same lenses are scored on it too",
        metavar="[NAME=]MODEL",
    )
    split: Split | None = option(
        None,
        "part of the text to score (default: the held-out part of a text that a lens was trained "
        "on, and all of any other text)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lenses = [self.lenses] if isinstance(self.lenses, str | PurePath) else self.lenses
        object.__setattr__(self, "lenses", tuple(map(str, lenses)))
