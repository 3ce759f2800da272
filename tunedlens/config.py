"""What makes a run: frozen dataclasses, validated when they are made.

A field's `help` is its documentation: the command line shows it, and a YAML file given
as `--config` uses the same names.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from types import NoneType
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from tunedlens.errors import InputError
from tunedlens.files import JsonObject, as_type

Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["fp32", "bf16"]
Kernel = Literal["products", "attention"]
FitName = Literal["preconditioned", "closed-form", "jacobian", "sgd", "muon"]
ONE_PASS: tuple[FitName, ...] = ("closed-form", "jacobian")
"""Fits that take no steps."""
BASELINES: tuple[FitName, ...] = ("sgd", "muon")
"""Published fits, which do not start from the closed form."""
JacobianTargets = Literal["later", "same"]
MetricSet = Literal["standard", "all"]
Split = Literal["train", "validation", "all"]
WandbMode = Literal["online", "offline", "disabled"]


def option(default: Any, meaning: str) -> Any:
    """A documented field."""
    return dataclasses.field(default=default, metadata={"help": meaning})


class _Range(NamedTuple):
    description: str
    contains: Callable[[float], bool]


_AT_LEAST_1 = _Range("at least 1", lambda value: value >= 1)
_MAX_BLOCKS = 2**20
_BLOCKS = _Range(f"from 1 to {_MAX_BLOCKS:,}", lambda value: 1 <= value <= _MAX_BLOCKS)
_ABOVE_0 = _Range("above 0", lambda value: 0 < value < math.inf)
_0_OR_MORE = _Range("0 or more", lambda value: 0 <= value < math.inf)
_ACCEPTED = {
    "seq_len": _Range("at least 2", lambda value: value >= 2),
    "tokens": _AT_LEAST_1,
    "self_tokens": _AT_LEAST_1,
    "max_tokens": _AT_LEAST_1,
    "init_tokens": _AT_LEAST_1,
    "batch_size": _BLOCKS,
    "micro_batch_size": _BLOCKS,
    "validation_tokens": _AT_LEAST_1,
    "evaluate_tokens": _AT_LEAST_1,
    "skip_first": _0_OR_MORE,
    "vocab_sample": _Range("0 (all of it) or at least 64", lambda value: value == 0 or value >= 64),
    "low_rank": _AT_LEAST_1,
    "ridge": _ABOVE_0,
    "lr": _ABOVE_0,
    "momentum": _Range("in [0, 1)", lambda value: 0 <= value < 1),
    "weight_decay": _0_OR_MORE,
    "seed": _Range("in [0, 2^32)", lambda value: 0 <= value < 2**32),
}
"""The values that a field of this name accepts, in any config."""


@dataclass(frozen=True)
class _Config:
    """Checks every field against the choices of its type and the range of its name."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            flag, value = "--" + field.name.replace("_", "-"), getattr(self, field.name)
            types = (hints[field.name], *get_args(hints[field.name]))
            if value is None and NoneType in types:
                continue
            choices = next((get_args(part) for part in types if get_origin(part) is Literal), ())
            if choices and value not in choices:
                raise InputError(f"{flag} must be one of {', '.join(choices)}; got {value!r}")
            accepted = _ACCEPTED.get(field.name)
            if accepted and not accepted.contains(value):
                raise InputError(f"{flag} must be {accepted.description}, got {value}")


@dataclass(frozen=True)
class ModelConfig(_Config):
    """Which model is examined, and where it runs."""

    model: str | None = option(
        None, "hub name (gpt2, distilgpt2, ...) or folder; without it, the embedded GPT-2"
    )
    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    dtype: Dtype = option("float32", "dtype of the model's weights")
    device: str | None = option(None, "cpu, cuda, mps, ...; without it, the fastest one available")
    device_map: str | None = option(
        None,
        "auto, balanced, balanced_low_0 or sequential: spread the model over all devices (and the "
        "memory of the CPU), instead of --device",
    )
    adapter: str | None = option(
        None, "folder or hub name of a PEFT adapter that is merged into the model (needs peft)"
    )
    gguf_file: str | None = option(
        None, "GGUF file in the folder or on the hub that holds the weights"
    )
    trust_remote_code: bool = option(
        False, "run the code that the model's repository brings along; only for one that you trust"
    )
    blocks: str | None = option(
        None, "path of the list of blocks, such as model.layers, if it is not found by itself"
    )
    final_norm: str | None = option(
        None, "path of the final norm, such as model.norm, if it is not found; none for no norm"
    )

    def on_any_device(self) -> Self:
        """The same model, wherever it runs on this machine."""
        return dataclasses.replace(self, device=None, device_map=None)


@dataclass(frozen=True)
class CorpusConfig(_Config):
    """Which text is read, and how it is divided into blocks."""

    dataset: str | None = option(
        None,
        "file, folder, glob (.txt .md .py .jsonl .json .csv .parquet) or hub name, or self for "
        "text sampled from the model; without it, the embedded model's own text, or OpenWebText "
        "from the hub for another model",
    )
    dataset_config: str | None = option(None, "configuration of a dataset on the hub")
    dataset_split: str = option("train", "split of a dataset on the hub")
    dataset_revision: str | None = option(None, "branch, tag or commit of a dataset on the hub")
    validation_split: str | None = option(
        None,
        "split of a dataset on the hub to hold out; without it, a fraction of the documents, "
        "chosen by their hash (of the blocks, if there is one document)",
    )
    text_column: str | None = option(
        None, "column with the text; without it, `text` or the only column of strings"
    )
    chat: bool = option(
        False,
        "render the conversations of the column `messages` (lists of {role, content}; see "
        "--text-column) with the tokenizer's chat template; a --prompt becomes a user's turn",
    )
    self_tokens: int | None = option(
        None, "tokens to sample for --dataset self (default: as many as the run needs at most)"
    )
    streaming: bool = option(False, "read the text while training instead of all at once")
    seq_len: int | None = option(
        None, "tokens in a block; without it, the model's context, at most 1024"
    )
    bos: bool | None = option(
        None,
        "start every block with the tokenizer's BOS token; without it, if the tokenizer itself "
        "puts one before a text",
    )


@dataclass(frozen=True)
class TrainConfig(_Config):
    """Everything that a trained lens depends on. None leaves a choice to the run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    fit: FitName = option(
        "preconditioned",
        "preconditioned: closed form, then preconditioned Muon; closed-form: only least squares, "
        "in one pass; jacobian: the mean Jacobian instead of a fit; sgd, muon: published baselines",
    )
    tokens: int | None = option(
        None,
        "positions to train on, rounded up to whole steps; without it, until held-out KL has "
        "converged (published baselines: 512,000)",
    )
    max_tokens: int | None = option(
        None, "the largest number of positions without --tokens (default: 2,048 × d_model)"
    )
    init_tokens: int | None = option(
        None,
        "positions of the first pass, from which the closed form is computed (default: "
        "128 × d_model, and at most a quarter of --tokens; for --fit closed-form 1,024 × d_model; "
        "for --fit jacobian 8,192)",
    )
    sites: str | None = option(
        None,
        "further sites that get translators besides the stream entering each block (resid_pre), "
        "separated by commas: resid_mid, attn_out, mlp_out",
    )
    layers: str | None = option(
        None,
        "layers that get translators, separated by commas; negative ones count from the last layer "
        "that can have one, so 0,6,-1 is the embeddings, layer 6 and the stream entering the last "
        "block (default: all)",
    )
    low_rank: int | None = option(
        None, "the largest rank of A in a translator h + A h + b, which makes the file smaller"
    )
    bias_only: bool = option(
        False, "train only the bias of every translator, h + b: the debiased logit lens"
    )
    init: str | None = option(
        None,
        "folder of a saved tuned lens, for this model or another one of the same shape, that the "
        "steps start from instead of the closed form",
    )
    jacobian_targets: JacobianTargets = option(
        "later",
        "for --fit jacobian: differentiate the final states at the same and all later positions "
        "(as published), or at the same position only",
    )
    ridge: float | None = option(
        None,
        "ridge of the closed form, relative to the mean square of a state; it pulls towards the "
        "logit lens; without it, chosen for each layer on held-out text",
    )
    batch_size: int | None = option(
        None,
        "blocks in one step, over all processes (default: about 4 × d_model tokens; published "
        "baselines: 2,048 tokens)",
    )
    micro_batch_size: int | None = option(
        None,
        "blocks in one forward pass; changes memory, not results (default: about 2,048 tokens on a "
        "CPU, elsewhere a whole step)",
    )
    skip_first: int = option(0, "positions at the start of each block that are not trained on")
    precision: Precision | None = option(
        None,
        "precision of matrix products while training; without it, the run measures the faster "
        "one when it starts",
    )
    kernel: Kernel | None = option(
        None,
        "how the objective is computed: with two matrix products and a chunk of logits, or with "
        "attention (CPUs only) and no logits; without it, the run measures the faster one",
    )
    vocab_sample: int | None = option(
        None,
        "tokens of the vocabulary that a step's gradient is estimated from; 0 takes all of them "
        "(default: 6,144 if the vocabulary is over four times as large, else 0)",
    )
    lr: float | None = option(
        None,
        "learning rate; for the default fit, relative to the error of the closed form (default: "
        "depends on the fit)",
    )
    momentum: float | None = option(None, "momentum (default: depends on the fit)")
    weight_decay: float | None = option(
        None, "weight decay towards the initial lens (default: depends on the fit)"
    )
    seed: int = option(0, "seed of the order of the blocks and of the vocabulary samples")
    validation_tokens: int | None = option(
        None,
        "held-out positions of each validation, in whole blocks (default: 8,192, or fewer if "
        "validation would take over a tenth of the run; at most --evaluate-tokens)",
    )
    evaluate_tokens: int | None = option(
        None,
        "held-out positions of the table at the end (default: 16,384, or fewer if the table would "
        "take over a fifth of the run)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit in ONE_PASS and self.tokens is not None:
            raise InputError(f"--fit {self.fit} takes no steps; give --init-tokens, not --tokens")
        if self.fit == "jacobian" and self.sites:
            raise InputError("--fit jacobian has no further sites; leave out --sites")
        if self.bias_only and self.fit not in ("preconditioned", "closed-form"):
            raise InputError(
                f"--bias-only works with --fit preconditioned and closed-form, not {self.fit}"
            )
        if self.low_rank is not None and (self.bias_only or self.fit in ("jacobian", *BASELINES)):
            other = "--bias-only" if self.bias_only else f"--fit {self.fit}"
            raise InputError(f"--low-rank does not work with {other}; leave one of them out")
        _ = self.chosen_layers  # checked now rather than when the model is loaded
        if self.init is not None and self.fit in ONE_PASS:
            raise InputError(f"--fit {self.fit} takes no steps, so it cannot start from --init")

    @property
    def further_sites(self) -> list[str]:
        """The sites that `sites` names."""
        return self.sites.split(",") if self.sites else []

    @property
    def chosen_layers(self) -> list[int] | None:
        """The layers that `layers` names; None for all."""
        if self.layers is None:
            return None
        try:
            return [int(layer) for layer in self.layers.split(",")]
        except ValueError:
            raise InputError(
                f"--layers must be numbers separated by commas, like 0,6,-1; got {self.layers!r}"
            ) from None

    @classmethod
    def from_json(cls, data: JsonObject, what: str) -> Self:
        """The inverse of `dataclasses.asdict`, also for manifests of 0.1.0.

        Args:
            what: what messages call the data.

        Raises:
            InputError: a value is not known or of another type.
        """
        renamed = {"most_tokens": "max_tokens", "start_tokens": "init_tokens"}  # since 0.1.0
        fields = {renamed.get(name, name): value for name, value in data.items()}
        fields.pop("compile", None)  # of 0.1.0
        if isinstance(corpus := data.get("corpus"), dict):
            fields["corpus"] = {"bos": False} | corpus  # 0.1.0 had no BOS
        if isinstance(model := data.get("model"), dict):
            # A file cannot allow code to run; only its reader can.
            fields["model"] = {k: v for k, v in model.items() if k != "trust_remote_code"}
        return as_type(cls, fields, what)


@dataclass(frozen=True)
class ScoringConfig(_Config):
    """How many positions are scored, and which metrics are computed."""

    tokens: int | None = option(
        None, "positions to score, exactly (default: 65,536, or all if the text has fewer)"
    )
    metrics: MetricSet = option(
        "standard",
        "all: also the reverse KL, Jensen-Shannon, ranks, confidence and calibration",
    )
    by_position: bool = option(False, "also compute every metric by position in the block")
    transfer: bool = option(
        False,
        "also apply every layer's translator at every other layer, which multiplies the work by "
        "the number of layers",
    )
    batch_size: int = option(8, "blocks in one forward pass; changes memory, not results")


@dataclass(frozen=True)
class EvaluateConfig(ScoringConfig):
    """Which lenses are evaluated, and on which model and text.

    Settings of `model` and `corpus` that keep their defaults are those that the first saved lens
    was trained with, as long as its own model and text are used.
    """

    lenses: tuple[str, ...] = ()
    """Folders of saved lenses, names on the hub, `unigram` or `mean`, each with an optional `NAME=`
    in front. The logit lens is always added. If empty, the newest saved lens."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    beside: str | None = option(
        None,
        "[NAME=]MODEL: a second model of the same shape, such as a fine-tuned one (or the folder "
        "of a PEFT adapter for the first), on which the same lenses are scored beside the first",
    )
    split: Split | None = option(
        None,
        "side of the text to score (default: the held-out side of a text that a lens was trained "
        "on, and all of any other text)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lenses, (str, PurePath)):
            raise InputError(f"lenses must be a tuple, got {self.lenses!r}")
        object.__setattr__(self, "lenses", tuple(map(str, self.lenses)))
