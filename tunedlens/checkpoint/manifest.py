"""The manifest of a lens: `config.json`, which describes the lens and how it was made."""

from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from tunedlens.config import TrainConfig
from tunedlens.errors import InputError
from tunedlens.files import JsonObject, as_type, read_json
from tunedlens.fit import ValidationResult
from tunedlens.provenance import Provenance

FORMAT = 1
MANIFEST = "config.json"
WEIGHTS = "lens.safetensors"


class _Model(TypedDict):
    name: str
    revision: NotRequired[str | None]
    fingerprint: NotRequired[str]


class _Text(TypedDict):
    dataset: str
    bytes: NotRequired[int]
    tokens_sha256: NotRequired[str]


class _Progress(TypedDict):
    tokens: int
    init_tokens: NotRequired[int]
    start_tokens: NotRequired[int]
    """The name of `init_tokens` in version 0.1.0."""
    seconds: NotRequired[float]


class _Result(TypedDict):
    lens: str
    layer: int | None
    metric: str
    value: float
    standard_error: float | None


class _HeldOut(TypedDict):
    results: list[_Result]


class _Manifest(TypedDict):
    """The entries of a manifest. A lens that was not saved by `train` has only some of them."""

    format: int
    lens: Literal["tuned", "jacobian"]
    created: str
    model: _Model
    lens_sha256: str
    sites: NotRequired[list[str]]
    layers: NotRequired[list[int] | None]
    rank: NotRequired[int | None]
    config: NotRequired[JsonObject]
    corpus: NotRequired[dict[str, _Text]]
    progress: NotRequired[_Progress]
    held_out: NotRequired[_HeldOut]
    probe: NotRequired[JsonObject | None]
    provenance: NotRequired[Provenance]


def read_manifest(folder: Path) -> JsonObject:
    """Read `config.json` of a saved lens.

    Raises:
        InputError: there is no lens in the folder, or its manifest is damaged.
    """
    path = folder / MANIFEST
    manifest = read_json(
        path,
        f"{folder} holds no lens: expected {MANIFEST} and {WEIGHTS}, as `train` writes them",
    )
    if not isinstance(manifest, dict) or "lens" not in manifest:
        raise InputError(f"{path} is not the manifest of a lens: expected an object with lens")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {manifest.get('format')!r:.40}; this version reads format "
            f"{FORMAT}, so use the version of tunedlens that wrote it"
        )
    as_type(_Manifest, manifest, str(path))
    if "config" in manifest:
        TrainConfig.from_json(manifest["config"], str(path))
    return manifest


def trained_tokens(manifest: JsonObject) -> tuple[int, int]:
    """Positions of the first pass and of the steps of a lens that was made by `train`."""
    progress = manifest["progress"]
    first_pass = progress.get("init_tokens", progress.get("start_tokens", 0))  # 0.1.0: start_tokens
    return first_pass, progress["tokens"]


def validations(manifest: JsonObject) -> list[ValidationResult]:
    """The held-out KL while a lens was trained; empty if it is not known or no steps were taken.

    Raises:
        InputError: the manifest is damaged.
    """
    progress = manifest.get("progress", {})
    found = progress.get("history") or progress.get("curve", {}).get("looks", [])  # 0.1.0: looks
    history = as_type(list[ValidationResult], found, f"the history in {MANIFEST}")
    if len({len(one.kl_nats) for one in history}) > 1:
        raise InputError(f"the history in {MANIFEST} is damaged: its validations differ in length")
    return history
