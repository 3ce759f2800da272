"""Finds the folders and the manifests of lenses by their names."""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunedlens import builtin, checkpoint
from tunedlens.config import ModelConfig, TrainConfig
from tunedlens.errors import InputError
from tunedlens.files import JsonObject, require_lens_name
from tunedlens.fit import mean_lens, unigram_lens

BASELINES = {"unigram": (unigram_lens, 10_000_000), "mean": (mean_lens, 65_536)}
"""By kind: the function that makes a baseline, and the largest number of positions that it uses."""


@dataclass(frozen=True)
class LensSpec:
    """A lens that is evaluated."""

    name: str
    kind: str
    """logit, unigram, mean, in memory; for a saved lens tuned, closed-form, bias-only, jacobian."""


@dataclass(frozen=True)
class SavedLens(LensSpec):
    """A lens on disk or on the hub, in any format that `load_lens` reads."""

    source: str
    """The path or the name on the hub, as it was given."""
    folder: Path
    """The folder or the file, or the local copy of the one on the hub."""
    manifest: JsonObject
    """As `describe_lens` returns it."""
    trained: TrainConfig
    """The config of its training; if the manifest has none, the defaults with its model."""

    @classmethod
    def read(cls, name: str, source: str) -> "SavedLens":
        """Read the description of a lens; a lens on the hub is downloaded first."""
        folder = checkpoint.find_lens(source)
        manifest = checkpoint.describe_lens(folder)
        if "config" in manifest:
            trained = checkpoint.saved_config(folder)
        else:
            about = manifest["model"]
            made_for = ModelConfig(about.get("name"), revision=about.get("revision"))
            trained = TrainConfig(model=made_for)
        kind = manifest["lens"]
        if kind == "tuned" and trained.fit == "closed-form":
            kind = trained.fit
        if kind in ("tuned", "closed-form") and trained.bias_only:
            kind = "bias-only"
        return cls(name, kind, source, folder, manifest, trained)

    @property
    def is_text_known(self) -> bool:
        """Whether the lens records the text that it was trained on."""
        return "config" in self.manifest

    @property
    def title(self) -> str:
        """The last part of its path or of its name on the hub."""
        name = checkpoint.hub_name(self.source)
        return name.title if name else self.folder.resolve().name

    @property
    def results_folder(self) -> Path:
        """The folder for results: that of the lens or, for one on the hub, a folder of its name."""
        if checkpoint.hub_name(self.source) is None:
            return self.folder.with_suffix("") if self.folder.is_file() else self.folder
        return checkpoint.ROOT / re.sub(r"[/@:]+", "--", self.source)


def lens_specs(asked: Iterable[str], in_memory: Iterable[str] = ()) -> list[LensSpec]:
    """The logit lens and the lenses asked for, each with a unique name.

    Args:
        asked: paths, names on the hub, `unigram`, `mean` or `logit`, each with an optional prefix
            `NAME=`.
        in_memory: names of further lenses.

    Raises:
        InputError: there is no such lens, or two have the same name.
    """
    specs = [LensSpec("logit", "logit")]
    for text in asked:
        name, _, rest = ("", "", text) if os.path.exists(text) else text.rpartition("=")
        if rest in BASELINES:
            specs.append(LensSpec(name or rest, rest))
        elif rest != "logit":
            specs.append(SavedLens.read(name, rest))
    wanted = [spec.name or spec.kind for spec in specs]
    for index, spec in enumerate(specs):
        if not spec.name and isinstance(spec, SavedLens):
            is_taken = wanted.count(spec.kind) > 1
            name = spec.title if is_taken else spec.kind
            specs[index] = dataclasses.replace(spec, name=name)
    specs += [LensSpec(name, "in memory") for name in in_memory]
    names = [spec.name for spec in specs]
    for spec in specs:
        require_lens_name(spec.name)
        if names.count(spec.name) > 1 or spec.name == "model":
            source = spec.source if isinstance(spec, SavedLens) else spec.kind
            raise InputError(
                f"the lens name {spec.name} is already used; choose another: --lens NAME={source}"
            )
    return specs


def saved_lenses(specs: Iterable[LensSpec]) -> list[SavedLens]:
    """The lenses that are saved in a folder or on the hub."""
    return [spec for spec in specs if isinstance(spec, SavedLens)]


def model_as_trained(config: ModelConfig, saved: Sequence[SavedLens]) -> ModelConfig:
    """The config of the model; without a name, that of the first saved lens's training.

    Settings that are not defaults are kept. Without a saved lens it is the embedded model.
    """
    if config.model is not None:
        return config
    trained = saved[0].trained.model if saved else ModelConfig()
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    name = trained.model or builtin.NAME
    return dataclasses.replace(trained.on_any_device(), **{"model": name} | given)


def trained_on(saved: Sequence[SavedLens], dataset: str | None) -> list[SavedLens]:
    """The lenses that were trained on a text; by default on the first text that is known."""
    known = [spec for spec in saved if spec.is_text_known]
    if dataset is None and known:
        dataset = known[0].trained.corpus.dataset
    return [spec for spec in known if _is_same(spec.trained.corpus.dataset, dataset)]


def _is_same(one: str | None, other: str | None) -> bool:
    if one == other or one is None or other is None:
        return one == other
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()
