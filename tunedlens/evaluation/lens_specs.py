"""From the names of lenses to their folders and manifests."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tunedlens import builtin, checkpoint
from tunedlens.config import ModelConfig, TrainConfig
from tunedlens.errors import InputError
from tunedlens.files import JsonObject

BASELINE_TOKENS = {"unigram": 10_000_000, "mean": 65_536}
"""The most positions of the training text that each baseline is made from."""


@dataclass(frozen=True)
class LensSpec:
    """A lens that is evaluated."""

    name: str
    kind: str
    """logit, unigram, mean, in memory; or for a saved lens tuned, closed-form, jacobian."""
    folder: Path | None = None

    @cached_property
    def manifest(self) -> JsonObject:
        """The manifest of a saved lens."""
        assert self.folder is not None
        return checkpoint.read_manifest(self.folder)

    @cached_property
    def trained(self) -> TrainConfig:
        """The config of a saved lens's training; the defaults if its manifest has none."""
        if self.folder is None or "config" not in self.manifest:
            return TrainConfig()
        return checkpoint.saved_config(self.folder)


def lens_specs(asked: Sequence[str] | None, in_memory: Sequence[str] = ()) -> list[LensSpec]:
    """The logit lens and the lenses asked for, each with a unique name.

    Args:
        asked: folders, `unigram`, `mean` or `logit`, each with an optional `NAME=` in front. None
            stands for the newest saved lens.
        in_memory: names of further lenses.

    Raises:
        InputError: there is no such lens, or two have the same name.
    """
    if asked is None:
        asked = [str(checkpoint.newest_lens(checkpoint.ROOT))]
    specs = [LensSpec("logit", "logit")]
    for text in asked:
        name, _, rest = ("", "", text) if Path(text).is_dir() else text.rpartition("=")
        if rest in BASELINE_TOKENS:
            specs.append(LensSpec(name, rest))
        elif rest != "logit":
            spec = LensSpec(name, "", Path(rest))
            specs.append(dataclasses.replace(spec, kind=_kind(spec.manifest)))
    wanted = [spec.name or spec.kind for spec in specs]
    specs = [spec if spec.name else _named(spec, wanted) for spec in specs]
    specs += [LensSpec(name, "in memory") for name in in_memory]
    _require_unique([(spec.name, str(spec.folder or spec.kind)) for spec in specs])
    return specs


def trained_model(saved: Sequence[LensSpec]) -> ModelConfig:
    """The model that the first saved lens was trained on; without a lens, the embedded one."""
    model = saved[0].trained.model if saved else ModelConfig()
    return dataclasses.replace(model, model=model.model or builtin.NAME, device=None)


def model_as_trained(config: ModelConfig, saved: Sequence[LensSpec]) -> ModelConfig:
    """The config of the model; without a name, that of the lenses' training and their settings."""
    if config.model is not None:
        return config
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    return dataclasses.replace(trained_model(saved), **given)


def trained_on(saved: Sequence[LensSpec], dataset: str | None) -> list[LensSpec]:
    """The lenses that were trained on a text; by default on the text of the first lens."""
    if dataset is None and saved:
        dataset = saved[0].trained.corpus.dataset
    return [spec for spec in saved if _is_same(spec.trained.corpus.dataset, dataset)]


def _kind(manifest: JsonObject) -> str:
    """The kind of a saved lens; closed-form if its fit took no steps."""
    fit = manifest.get("config", {}).get("fit")
    return "closed-form" if fit == "closed-form" else manifest["lens"]


def _named(spec: LensSpec, wanted: list[str]) -> LensSpec:
    """Named after its kind, or after its folder if the kind's name is taken."""
    is_taken = spec.folder is not None and wanted.count(spec.kind) > 1
    name = spec.folder.resolve().name if spec.folder and is_taken else spec.kind
    return dataclasses.replace(spec, name=name)


def _require_unique(named: Sequence[tuple[str, str]]) -> None:
    """Check names, each with what has it."""
    names = [name for name, _ in named]
    for name, source in named:
        if "/" in name:
            raise InputError(f"the lens name {name} contains a slash; choose one without")
        if names.count(name) > 1 or name == "model":
            raise InputError(f"the lens name {name} is taken; choose another: --lens NAME={source}")


def _is_same(one: str | None, other: str | None) -> bool:
    if one == other or one is None or other is None:
        return one == other
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()
