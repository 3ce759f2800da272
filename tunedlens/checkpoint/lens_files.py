"""Lenses on disk: safetensors for the translators, JSON for what made them."""

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from tunedlens.errors import InputError
from tunedlens.files import JsonObject, newest_folder, now, read_json, write, write_json
from tunedlens.lenses import AffineLens, JacobianLens, TunedLens
from tunedlens.model import FrozenModel, HookPoint, probe_kl, probe_tolerance, require_same_model

FORMAT = 1
ROOT = Path("checkpoints")
"""The default folder of runs."""
MANIFEST = "config.json"
WEIGHTS = "lens.safetensors"
KINDS: dict[str, type[AffineLens]] = {"tuned": TunedLens, "jacobian": JacobianLens}
"""The kinds of lens that can be saved, by their names in a manifest."""


def save_lens(
    lens: AffineLens, folder: str | Path, metadata: Mapping[str, object] | None = None
) -> None:
    """Write a lens: first its translators, then the manifest with their hash.

    Args:
        folder: created if it does not exist; a lens in it is replaced.
        metadata: further entries of the manifest (config, corpus, results).

    Raises:
        InputError: a value is not finite, or the folder cannot be written.
    """
    folder = Path(folder)
    for name, value in lens.translators.state_dict().items():
        if not value.isfinite().all():
            raise InputError(f"the lens is not finite ({name}), so it is not written to {folder}")
    tensors = {
        name: value.cpu().contiguous()
        for name, value in lens.translators.state_dict().items()
        if name.endswith(".bias") or value.any()
    }
    weights = safetensors.torch.save(tensors)
    write(folder / WEIGHTS, weights)
    manifest = {
        "format": FORMAT,
        "lens": kind_of(lens),
        "sites": lens.sites,
        "layers": lens.layers,
        "rank": lens.rank,
        "created": now(),
        "model": dataclasses.asdict(lens.identity),
        "lens_sha256": hashlib.sha256(weights).hexdigest(),
        **(metadata or {}),
    }
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> JsonObject:
    """Read `config.json` of a saved lens.

    Raises:
        InputError: there is no lens in the folder, or its manifest is damaged.
    """
    path = folder / MANIFEST
    manifest = read_json(
        path, f"{folder} holds no lens: expected {MANIFEST} and {WEIGHTS}, as train.py writes them"
    )
    if not isinstance(manifest, dict) or manifest.get("lens") not in KINDS:
        raise InputError(f"{path} is not the manifest of a lens ({' or '.join(KINDS)})")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}"
        )
    missing = {"model", "created", "lens_sha256"} - manifest.keys()
    if missing or not isinstance(manifest["model"], dict):
        raise InputError(f"{path} is damaged: it says nothing of {', '.join(missing) or 'a model'}")
    return manifest


def kind_of(lens: AffineLens) -> str:
    """The name of a lens's kind in a manifest."""
    return next(name for name, kind in KINDS.items() if type(lens) is kind)


def read_lens(folder: Path, model: FrozenModel, *, check: bool = True) -> AffineLens:
    """Read a lens of any kind that was saved for this model.

    Args:
        check: whether to warn if the model's predictions have changed since the lens was made.

    Raises:
        InputError: there is no lens, it is damaged, or it belongs to another model (other width,
            depth, vocabulary, norm or unembedding).
    """
    manifest = read_manifest(folder)
    sites = manifest.get("sites", ["resid_pre"])  # 0.1.0 had one site, all layers and full rank
    layers, rank = manifest.get("layers"), manifest.get("rank")
    lens = KINDS[manifest["lens"]].from_model(model, sites, layers, rank)
    fill_lens(lens, folder)
    probe = manifest.get("probe")
    if (
        check
        and probe is not None
        and (kl := probe_kl(probe, model)) > probe_tolerance(probe, model)
    ):
        warnings.warn(
            f"the lens in {folder} was made for a model with the same norm and unembedding, but "
            f"{model.identity.name} computes otherwise (KL {kl:.3g} nats on a short text): its "
            "blocks are others, or another version of transformers computes them otherwise",
            stacklevel=3,
        )
    bos = manifest.get("config", {}).get("corpus", {}).get("bos")
    if check and bos is not None and bos != (model.bos_id is not None):
        warnings.warn(
            f"the lens in {folder} was trained on text {'with' if bos else 'without'} BOS in "
            f"front, and texts for {model.identity.name} are read {'without' if bos else 'with'} "
            f"it; call model.set_bos({bos})",
            stacklevel=3,
        )
    return lens


def fill_lens(lens: AffineLens, folder: Path, *, any_model: bool = False) -> JsonObject:
    """Fill a lens with saved translators; returns their manifest.

    A lens of full rank can be filled with translators of low rank.

    Args:
        any_model: accept a lens that was made for another model of the same shape, or has further
            translators.

    Raises:
        InputError: there is no lens, it is damaged or of another kind, holds values that are
            not finite, or belongs to another model.
    """
    manifest = read_manifest(folder)
    if manifest["lens"] != kind_of(lens):
        raise InputError(f"{folder} holds a {manifest['lens']} lens, not a {kind_of(lens)} lens")
    if not any_model:
        identity = dataclasses.asdict(lens.identity)
        require_same_model(manifest["model"], identity, f"the lens in {folder}")
    path = folder / WEIGHTS
    try:
        weights = path.read_bytes()
        tensors = safetensors.torch.load(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from error
    if hashlib.sha256(weights).hexdigest() != manifest["lens_sha256"]:
        raise InputError(f"{path} is damaged: it is not the file that {MANIFEST} describes")
    expected = lens.translators.state_dict()
    if lens.rank is None:
        for name in [name for name in tensors if name.endswith(".left")]:
            point = name.removesuffix(".left")
            tensors[f"{point}.weight"] = tensors.pop(name) @ tensors.pop(f"{point}.right")
    if any_model:
        tensors = {name: value for name, value in tensors.items() if name in expected}
    # A translator whose weight is zero everywhere is saved as its bias.
    omitted = {name for name in expected.keys() - tensors.keys() if not name.endswith(".bias")}
    tensors |= {name: torch.zeros_like(expected[name]) for name in omitted}
    if (wrong := expected.keys() ^ tensors.keys()) or (
        wrong := {name for name, value in tensors.items() if value.shape != expected[name].shape}
    ):
        raise InputError(
            f"{path} does not hold {len(expected)} tensors for {len(lens.layers)} layers of width "
            f"{lens.identity.d_model}: {min(wrong)} is missing, not expected, or of another shape"
        )
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise InputError(f"{path} holds values that are not finite ({name}); train it again")
    lens.translators.load_state_dict(tensors)
    return manifest


def newest_lens(root: Path) -> Path:
    """The folder under `root` whose manifest has the latest time.

    Raises:
        InputError: there is none.
    """
    folders = [path.parent for path in root.glob(f"*/{MANIFEST}")]
    found = newest_folder(folders, lambda folder: read_manifest(folder)["created"])
    if found is None:
        raise InputError(f"there is no lens under {root}; train one (train.py) or give --lens")
    return found


def saved_points(folder: Path) -> list[HookPoint]:
    """Where a saved lens has translators, from the header of its file.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = folder / WEIGHTS
    try:
        with safetensors.safe_open(path, "pt") as file:
            parts = [name.split(".") for name in file.keys()]  # noqa: SIM118
            return sorted({HookPoint(site, int(layer)) for site, layer, _ in parts})
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from error
