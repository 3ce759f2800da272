"""The config of a training run."""

import dataclasses
from dataclasses import dataclass
from typing import Self

from tunedlens.config.base import (
    BASELINES,
    ONE_PASS,
    Config,
    FitName,
    JacobianTargets,
    Kernel,
    Precision,
    option,
)
from tunedlens.config.inputs import CorpusConfig, ModelConfig
from tunedlens.errors import InputError
from tunedlens.files import JsonObject, as_type


@dataclass(frozen=True)
class TrainConfig(Config):
    """All settings that a trained lens depends on. The run chooses a setting that is None."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    fit: FitName = option(
        "preconditioned",
        "preconditioned: closed form, then preconditioned Muon; closed-form: only least squares, "
        "in one pass; jacobian: the mean Jacobian instead of a fit; sgd, muon: published baselines",
    )
    tokens: int | None = option(
        None,
        "positions to train on, rounded up to whole steps (default: until held-out KL has "
        "converged; published baselines: 512,000)",
    )
    max_tokens: int | None = option(
        None, "largest number of positions if --tokens is not given (default: 2,048 × d_model)"
    )
    init_tokens: int | None = option(
        None,
        "positions of the first pass, from which the closed form is computed (default: "
        "128 × d_model, and at most a quarter of --tokens; for --fit closed-form 1,024 × d_model; "
        "for --fit jacobian 8,192)",
    )
    sites: str | None = option(
        None,
        "further sites that get translators, separated by commas: resid_mid, attn_out, mlp_out "
        "(the stream entering each block, resid_pre, always gets them)",
        metavar="SITES",
    )
    layers: str | None = option(
        None,
        "layers that get translators, separated by commas; negative numbers count from the last "
        "layer that can have one, so 0,6,-1 means the embeddings, layer 6 and the stream entering "
        "the last block (default: all)",
        metavar="LAYERS",
    )
    low_rank: int | None = option(
        None, "largest rank of A in a translator h + A h + b; a low rank makes the file smaller"
    )
    shard_layers: bool | None = option(
        None,
        "divide the layers among the processes, instead of training all layers in each process "
        "(default: only if the optimizer of all layers would take more than half of a device's "
        "memory)",
    )
    bias_only: bool = option(
        False, "train only the bias of every translator, h + b: the debiased logit lens"
    )
    init: str | None = option(
        None,
        "folder of a saved tuned lens from which the steps start, instead of the closed form; it "
        "may be for another model of the same shape",
        metavar="LENS",
    )
    jacobian_targets: JacobianTargets = option(
        "later",
        "for --fit jacobian: differentiate the final states at the same and all later positions "
        "(as published), or at the same position only",
    )
    ridge: float | None = option(
        None,
        "ridge of the closed form, relative to the mean square of a state; a larger ridge gives a "
        "lens closer to the logit lens (default: chosen for each layer on held-out text)",
    )
    batch_size: int | None = option(
        None,
        "blocks in one step, over all processes (default: about 4 × d_model tokens; published "
        "baselines: 2,048 tokens)",
    )
    micro_batch_size: int | None = option(
        None,
        "blocks in one forward pass; changes memory, not results (default: about 2,048 tokens on a "
        "CPU, a whole step on other devices)",
    )
    skip_first: int = option(
        0, "number of positions at the start of each block that are left out of training"
    )
    precision: Precision | None = option(
        None,
        "precision of matrix products in training (default: the faster one, which the run measures "
        "at its start)",
    )
    kernel: Kernel | None = option(
        None,
        "how the objective is computed: products uses two matrix products and a chunk of logits, "
        "attention (CPUs only) uses an attention kernel and no logits (default: the faster one, "
        "which the run measures at its start)",
    )
    vocab_sample: int | None = option(
        None,
        "number of vocabulary tokens from which the gradient of a step is estimated; 0 uses all of "
        "them (default: 6,144 if the vocabulary is over four times as large, else 0)",
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
    shuffle_window: int = option(
        0,
        "number of consecutive blocks of a streamed text that are shuffled together, with --seed; "
        "0 keeps the order of the text",
    )
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
            raise InputError("--fit jacobian does not support further sites; leave out --sites")
        if self.bias_only and self.fit not in ("preconditioned", "closed-form"):
            raise InputError(
                f"--bias-only works with --fit preconditioned and closed-form, not {self.fit}"
            )
        if self.low_rank is not None and (self.bias_only or self.fit in ("jacobian", *BASELINES)):
            other = "--bias-only" if self.bias_only else f"--fit {self.fit}"
            raise InputError(f"--low-rank does not work with {other}; leave one of them out")
        _ = self.chosen_layers  # checked now rather than when the model is loaded
        if self.init is not None and self.fit in ONE_PASS:
            raise InputError(
                f"--fit {self.fit} takes no steps, so it does not use --init; leave it out"
            )

    @property
    def further_sites(self) -> list[str]:
        """The names in `sites`."""
        return self.sites.split(",") if self.sites else []

    @property
    def chosen_layers(self) -> list[int] | None:
        """The numbers in `layers`; None for all layers."""
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
            what: a name for the data in error messages.

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
