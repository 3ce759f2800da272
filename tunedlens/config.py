"""What makes a run: frozen dataclasses, validated when they are made.

A field's `help` is its documentation: the command line shows it, and a YAML file given
as `--config` uses the same names.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from tunedlens.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["fp32", "bf16"]
Split = Literal["train", "validation", "all"]
WandbMode = Literal["online", "offline", "disabled"]


def option(default: Any, meaning: str) -> Any:
    """A documented field."""
    return dataclasses.field(default=default, metadata={"help": meaning})


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} must be at least 1, got {value}")


def _require_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        flag = "--" + name.replace("_", "-")
        raise InputError(f"{flag} must be one of {', '.join(choices)}; got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model is looked into, and where it runs."""

    model: str | None = option(
        None, "hub name (gpt2, distilgpt2, ...) or folder; without it, the embedded GPT-2"
    )
    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    dtype: Dtype = option("float32", "dtype of the model's weights")
    device: str | None = option(None, "cpu, cuda, mps, ...; without it, the best one found")

    def __post_init__(self) -> None:
        _require_choice(self, "dtype", get_args(Dtype))


@dataclass(frozen=True)
class CorpusConfig:
    """Which text is read, and how it is cut into blocks."""

    dataset: str | None = option(
        None,
        "file, folder, glob (.txt .md .py .jsonl .json .csv .parquet) or hub name; without it, "
        "the embedded model's own text, or OpenWebText from the hub for another model",
    )
    dataset_config: str | None = option(None, "configuration of a dataset on the hub")
    dataset_split: str = option("train", "split of a dataset on the hub")
    dataset_revision: str | None = option(None, "branch, tag or commit of a dataset on the hub")
    validation_split: str | None = option(
        None,
        "split of a dataset on the hub to hold out; without it, a share of the documents, "
        "chosen by their hash (of the blocks, where there is one document)",
    )
    text_column: str | None = option(
        None, "column with the text; without it, `text` or the only column of strings"
    )
    streaming: bool = option(False, "read while training instead of all at once")
    seq_len: int | None = option(
        None, "tokens in a block; without it, the model's context, at most 1024"
    )

    def __post_init__(self) -> None:
        if self.seq_len is not None and self.seq_len < 2:
            raise InputError(f"--seq-len must be at least 2, got {self.seq_len}")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the numbers of a trained lens depend on."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    tokens: int = option(1_048_576, "positions to train on, rounded up to whole steps")
    start_tokens: int = option(
        131_072,
        "positions of a first pass, whose least-squares solution the steps start from; 0 starts "
        "from the logit lens, with inputs as they are",
    )
    ridge: float = option(
        1e-4, "ridge of that solution, and damping of the steps; pulls towards the logit lens"
    )
    batch_size: int = option(4, "blocks in one step, over all processes")
    micro_batch_size: int | None = option(
        None, "blocks in one forward pass (gradient accumulation); changes memory, not results"
    )
    skip_first: int = option(0, "positions at the start of each block that are not trained on")
    precision: Precision | None = option(
        None,
        "matrix products while training: fp32 or bf16; without it, bf16 where the hardware "
        "multiplies it",
    )
    lr: float = option(0.12, "learning rate at the start; falls linearly to 0")
    momentum: float = option(0.9, "momentum of Muon")
    weight_decay: float = option(0.0, "weight decay; pulls the lens towards the logit lens")
    seed: int = option(0, "orders the blocks")
    evaluate_every: int = option(128, "steps between two looks at held-out text (and saves)")
    evaluate_tokens: int = option(16_384, "held-out positions in each of these looks")

    def __post_init__(self) -> None:
        _require_positive(
            self, "tokens", "batch_size", "micro_batch_size", "evaluate_every", "evaluate_tokens"
        )
        if self.precision is not None:
            _require_choice(self, "precision", get_args(Precision))
        if self.skip_first < 0:
            raise InputError(f"--skip-first must be 0 or more, got {self.skip_first}")
        if self.start_tokens < 0:
            raise InputError(f"--start-tokens must be 0 or more, got {self.start_tokens}")
        if not 0 < self.ridge < math.inf:
            raise InputError(f"--ridge must be above 0, got {self.ridge}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be above 0, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"--momentum must be in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"--weight-decay must be 0 or more, got {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be in [0, 2^32), got {self.seed}")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        parts = {"model": ModelConfig(**data["model"]), "corpus": CorpusConfig(**data["corpus"])}
        return cls(**data | parts)


@dataclass(frozen=True)
class EvaluateConfig:
    """What is scored, and with what."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    split: Split | None = option(
        None,
        "side of the text to score; without it, what was held out of the text that the lens was "
        "trained on, and all of any other text",
    )
    tokens: int = option(65_536, "positions to score, fewer if the text has fewer")
    batch_size: int = option(8, "blocks in one forward pass; changes memory, not results")

    def __post_init__(self) -> None:
        _require_positive(self, "tokens", "batch_size")
        if self.split is not None:
            _require_choice(self, "split", get_args(Split))
