"""What `--lens` names, and what its manifest says."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunedlens import checkpoint
from tunedlens.config import TrainConfig
from tunedlens.errors import InputError

BASELINE_TOKENS = {"unigram": 10_000_000, "mean": 65_536}
"""Positions of the training text that a baseline is made from, fewer if it has fewer."""


@dataclass(frozen=True)
class LensSpec:
    """What `--lens` names."""

    name: str
    kind: str
    """logit, unigram, mean; or of a saved lens: tuned, closed-form, jacobian."""
    folder: Path | None = None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What is known of a saved lens."""
        assert self.folder is not None
        return checkpoint.read_manifest(self.folder)

    @cached_property
    def trained(self) -> TrainConfig:
        """How a saved lens was made; the defaults where its manifest does not say."""
        if self.folder is None or "config" not in self.manifest:
            return TrainConfig()
        return checkpoint.saved_config(self.folder)


def lens_specs(asked: list[str] | None) -> list[LensSpec]:
    """What is to be evaluated, each with a name of its own.

    Raises:
        InputError: there is no such lens, or two have one name.
    """
    if asked is None:
        asked = [str(checkpoint.newest_lens(checkpoint.ROOT))]
    specs = [LensSpec("logit", "logit")]
    for text in asked:
        given, _, rest = ("", "", text) if Path(text).is_dir() else text.rpartition("=")
        if rest in BASELINE_TOKENS:
            specs.append(LensSpec(given, rest))
        elif rest != "logit":
            spec = LensSpec(given, "", Path(rest))
            specs.append(dataclasses.replace(spec, kind=_kind(spec.manifest)))
    wanted = [spec.name or spec.kind for spec in specs]
    for index, spec in enumerate(specs):
        if not spec.name:
            name = spec.kind
            if spec.folder is not None and wanted.count(name) > 1:
                name = spec.folder.resolve().name
            specs[index] = dataclasses.replace(spec, name=name)
    names = [spec.name for spec in specs]
    for spec in specs:
        if "/" in spec.name:
            raise InputError(f"a lens cannot be called {spec.name}; leave the slash out")
        if names.count(spec.name) > 1 or spec.name == "model":
            raise InputError(
                f"a lens of its own name is needed beside another {spec.name}; name it: --lens "
                f"NAME={spec.folder or spec.kind}"
            )
    return specs


def _kind(manifest: dict[str, Any]) -> str:
    """Tuned or jacobian; closed-form where the fit took no steps."""
    fit = manifest.get("config", {}).get("fit")
    return "closed-form" if fit == "closed-form" else manifest["lens"]


def of_same_text(saved: list[LensSpec], dataset: str | None) -> tuple[list[LensSpec], bool]:
    """The lenses trained on the text that is to be scored, and whether it is a trained-on one.

    Without `--dataset` it is the text of the first lens (by default, of none).
    """
    if dataset is None:
        if not saved:
            return [], True
        dataset = saved[0].trained.corpus.dataset
    own = [spec for spec in saved if _is_same(spec.trained.corpus.dataset, dataset)]
    return own, bool(own)


def _is_same(one: str | None, other: str | None) -> bool:
    if one == other or one is None or other is None:
        return one == other
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()
