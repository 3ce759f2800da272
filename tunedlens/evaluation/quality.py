"""The quality of a saved lens, for its card, with warnings."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from accelerate import Accelerator

from tunedlens import checkpoint
from tunedlens.config import CorpusConfig, EvaluateConfig, ModelConfig
from tunedlens.distributed import join_processes
from tunedlens.errors import InputError
from tunedlens.evaluation.calls import evaluate
from tunedlens.evaluation.lens_specs import SavedLens, lens_specs, model_as_trained, saved_lenses
from tunedlens.evaluation.results import Evaluation
from tunedlens.files import JsonObject
from tunedlens.fit import MIN_GAIN, MIN_TOKENS_PER_DIMENSION, Doubling, last_doubling
from tunedlens.model import FrozenModel, HookPoint, hook_points, load_configured

OFF_CORPUS = 1.5
"""A warning is given if the KL of a lens, relative to that of the logit lens, is more than this
many times as large on another text as on its own."""
_LEAST_NATS = 1e-12


class QualityWarning(NamedTuple):
    """A problem of a lens."""

    kind: Literal["undertrained", "off corpus"]
    message: str
    """One or two sentences."""


@dataclass(frozen=True)
class Quality:
    """The measured quality of a saved lens."""

    lens: str
    """Its name in the evaluations, such as tuned."""
    title: str
    """The last part of its path, or of its name on the hub."""
    manifest: JsonObject
    """As `describe_lens` returns it."""
    own: Evaluation
    """The evaluation on held-out text of its corpus, or on another text if its corpus is not known;
    see `is_held_out`."""
    transfer: Evaluation
    """The evaluation of every translator at every layer, on the first positions of this text."""
    others: list[Evaluation]
    """The evaluations on other corpora."""

    @property
    def is_held_out(self) -> bool:
        """Whether `own` is the text that was held out while the lens was trained."""
        trained_on = self.manifest.get("config", {}).get("corpus", {}).get("dataset")
        config = self.own.provenance["config"]
        return trained_on is not None and config["split"] == "validation"

    @property
    def doubling(self) -> Doubling | None:
        """The last doubling of the number of training tokens, if its history is known."""
        return last_doubling(checkpoint.validations(self.manifest))

    @property
    def gains(self) -> dict[HookPoint, float]:
        """The fraction by which the last doubling lowered the KL of each translator."""
        if self.doubling is None:
            return {}
        sites, layers = self.manifest.get("sites", ["resid_pre"]), self.manifest.get("layers")
        points = hook_points(sites, range(self.own.n_layers) if layers is None else layers)
        if len(points) != len(self.doubling.gains):
            raise InputError(
                f"the history in {checkpoint.MANIFEST} is damaged: it has "
                f"{len(self.doubling.gains)} translators, and the lens has {len(points)}"
            )
        return dict(zip(points, self.doubling.gains, strict=True))

    @property
    def warnings(self) -> list[QualityWarning]:
        """Warnings about too few training tokens, or about a worse fit on another text."""
        return [*self._undertrained(), *self._off_corpus()]

    def _undertrained(self) -> list[QualityWarning]:
        found = []
        short = {point: gain for point, gain in self.gains.items() if gain > MIN_GAIN}
        if short and self.doubling is not None:
            point, gain = max(short.items(), key=lambda item: item[1])
            where = f"layer {point.layer}" + f" {point.site}" * (point.site != "resid_pre")
            found.append(
                f"The lens is undertrained: the last doubling of its tokens (from "
                f"{self.doubling.before.tokens:,} to {self.doubling.after.tokens:,}) lowered "
                f"the held-out KL of {len(short)} of its {len(self.gains)} translators by more "
                f"than {percent(MIN_GAIN)}, at most by {percent(gain)} at {where}."
            )
        config = self.manifest.get("config", {})
        is_fitted = "progress" in self.manifest and config.get("fit") != "jacobian"
        if is_fitted and not config.get("bias_only", False):
            tokens = sum(checkpoint.trained_tokens(self.manifest))
            wanted = MIN_TOKENS_PER_DIMENSION * int(self.manifest["model"]["d_model"])
            if tokens < wanted:
                found.append(
                    f"The lens is undertrained: it was fitted to {tokens:,} tokens, and needs at "
                    f"least {wanted:,} ({MIN_TOKENS_PER_DIMENSION} times d_model)."
                )
        return [QualityWarning("undertrained", message) for message in found]

    def _off_corpus(self) -> list[QualityWarning]:
        if not self.is_held_out:
            return []
        here, found = share_of_logit_lens(self.own, self.lens), []
        for other in self.others:
            there = share_of_logit_lens(other, self.lens)
            if there > OFF_CORPUS * here:
                message = (
                    f"The lens does not fit {text_title(other)}: its KL there is {percent(there)} "
                    f"of the logit lens's (at the median layer), compared with {percent(here)} on "
                    "held-out text of its own corpus."
                )
                found.append(QualityWarning("off corpus", message))
        return found


def share_of_logit_lens(evaluation: Evaluation, lens: str) -> float:
    """The KL of a lens divided by that of the logit lens at the same state: the median of all."""
    shares = []
    for name in names_at_sites(evaluation, lens):
        logit = "logit" + name.removeprefix(lens)
        pairs = zip(
            evaluation.by_layer(name, "kl_nats"),
            evaluation.by_layer(logit, "kl_nats"),
            strict=True,
        )
        shares += [own.value / max(other.value, _LEAST_NATS) for own, other in pairs]
    return statistics.median(shares)


def names_at_sites(evaluation: Evaluation, lens: str) -> list[str]:
    """The names of a lens in results: its name, and its name followed by each further site."""
    return [name for name in evaluation.lenses if name == lens or name.startswith(f"{lens} ")]


def percent(fraction: float) -> str:
    """A fraction in per cent, with at least two digits."""
    value = 100 * fraction
    return f"{value:.2g} %" if abs(value) < 10 else f"{value:,.0f} %"


def text_title(evaluation: Evaluation) -> str:
    """The name of the scored text, without the folder of a file."""
    dataset = str(evaluation.provenance["config"]["corpus"]["dataset"])
    return Path(dataset).name if Path(dataset).exists() else dataset


def measure_quality(
    source: str | Path,
    *,
    dataset: str | None = None,
    also: Sequence[str] = (),
    tokens: int | None = None,
    model: FrozenModel | ModelConfig | None = None,
    accelerator: Accelerator | None = None,
    command: Sequence[str] | None = None,
) -> Quality:
    """Measure a saved lens for its card; `write_card` writes it.

    Args:
        source: a path or a name on the hub, as for `load_lens`.
        dataset: the text to score; by default the held-out part of the lens's training text.
        also: further texts on which the lens is scored.
        tokens: the number of positions of each text; by default as in an evaluation. Transfer is
            measured on this number divided by the number of layers, which takes as long.
        model: by default the model that the lens was trained on.
        accelerator: the processes and the device.
        command: the command to record; by default that of this process.

    Raises:
        InputError: the lens, the model or a text is missing, damaged or does not fit the others,
            or there is too little text.
    """
    saved = saved_lenses(lens_specs([str(source)]))
    if not saved:
        raise InputError(f"expected the path of a saved lens or its name on the hub, got {source}")
    (spec,) = saved
    given = ModelConfig() if model is None or isinstance(model, FrozenModel) else model
    config = model_as_trained(given, saved)
    accelerator = accelerator or join_processes(config.device)
    loaded = (
        model if isinstance(model, FrozenModel) else load_configured(config, accelerator.device)
    )

    def score(text: CorpusConfig, count: int | None, transfer: bool = False) -> Evaluation:
        asked = EvaluateConfig(
            count, transfer=transfer, lenses=(str(source),), model=config, corpus=text
        )
        return evaluate(asked, model=loaded, accelerator=accelerator, command=command)

    text = _text(spec, dataset)
    on_own = score(text, tokens)
    part = max(1, on_own.tokens // on_own.n_layers)
    return Quality(
        spec.name,
        spec.title,
        spec.manifest,
        on_own,
        score(text, part, transfer=True),
        [score(_text(spec, name), tokens) for name in also],
    )


def _text(spec: SavedLens, dataset: str | None) -> CorpusConfig:
    """A text in blocks like those of the training."""
    if dataset is None:
        return CorpusConfig()
    return CorpusConfig(dataset, bos=spec.trained.corpus.bos)
