"""Reads and writes lenses: safetensors for the translators, JSON for their description."""

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tunedlens.checkpoint.manifest import FORMAT, MANIFEST, WEIGHTS, read_manifest
from tunedlens.errors import InputError
from tunedlens.files import (
    JsonObject,
    newest_folder,
    now,
    read_tensor_header,
    read_tensors,
    require_finite,
    write,
    write_json,
)
from tunedlens.lenses import AffineLens, JacobianLens, TunedLens
from tunedlens.model import FrozenModel, HookPoint, probe_kl, probe_tolerance, require_same_model

ROOT = Path("checkpoints")
"""The default folder of runs."""
KINDS: dict[str, type[AffineLens]] = {"tuned": TunedLens, "jacobian": JacobianLens}
"""The kinds of lens that can be saved, by their names in a manifest (`manifest.Kind`)."""


def save_lens(
    lens: AffineLens, folder: str | Path, metadata: Mapping[str, object] | None = None
) -> None:
    """Write a lens to a folder: first its translators, then the manifest with their hash.

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
            f"{model.identity.name} has other outputs (KL {kl:.3g} nats on a short text): its "
            "blocks have other weights, or another version of transformers computes them "
            "differently; run tunedlens doctor, or train the lens again",
            stacklevel=3,
        )
    bos = manifest.get("config", {}).get("corpus", {}).get("bos")
    if check and bos is not None and bos != (model.bos_id is not None):
        warnings.warn(
            f"the lens in {folder} was trained on texts {'with' if bos else 'without'} BOS, but "
            f"{model.identity.name} reads texts {'without' if bos else 'with'} BOS; call "
            f"model.set_bos({bos})",
            stacklevel=3,
        )
    return lens


def fill_lens(lens: AffineLens, folder: Path, *, any_model: bool = False) -> JsonObject:
    """Fill a lens with saved translators; returns their manifest.

    A lens of full rank can be filled with translators of low rank.

    Args:
        any_model: whether to accept a lens that was made for another model of the same shape, or
            that has further translators.

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
    tensors, _, sha256 = read_tensors(path)
    if sha256 != manifest["lens_sha256"]:
        raise InputError(f"{path} is damaged: it is not the file that {MANIFEST} describes")
    expected = lens.translators.state_dict()
    if lens.rank is None:
        tensors = _with_products(tensors, lens.identity.d_model)
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
    require_finite(tensors, path)
    lens.translators.load_state_dict(tensors)
    return manifest


def _with_products(tensors: Mapping[str, Tensor], d_model: int) -> dict[str, Tensor]:
    """Replace translators of low rank, `left` and `right`, by their products."""
    found = dict(tensors)
    for name in tensors:
        point, _, part = name.rpartition(".")
        if part == "left" and f"{point}.right" in tensors:
            left, right = tensors[name], tensors[f"{point}.right"]
            # The product of other shapes could be much larger than the file.
            is_square = left.shape[:1] == right.shape[1:] == (d_model,)
            if is_square and left.shape[1:] == right.shape[:1]:
                found[f"{point}.weight"] = found.pop(name) @ found.pop(f"{point}.right")
    return found


def newest_lens(root: Path) -> Path:
    """The folder under `root` whose manifest has the latest time.

    Raises:
        InputError: there is none.
    """
    folders = [path.parent for path in root.glob(f"*/{MANIFEST}")]
    found = newest_folder(folders, lambda folder: read_manifest(folder)["created"])
    if found is None:
        raise InputError(
            f"there is no lens under {root}; train one with tunedlens train, or give --lens"
        )
    return found


def those_under(root: Path) -> str:
    """The end of a message about a missing lens: the lenses in a folder, if there are any."""
    folders = [str(path.parent) for path in sorted(root.glob(f"*/{MANIFEST}"))]
    return f"; saved lenses: {', '.join(folders)}" if folders else ""


def saved_points(folder: Path) -> list[HookPoint]:
    """The points at which a saved lens has translators, from the header of its file.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = folder / WEIGHTS
    parts = [name.split(".") for name in read_tensor_header(path).names]
    try:
        return sorted({HookPoint(site, int(layer)) for site, layer, _ in parts})
    except ValueError as error:
        raise InputError(f"{path} is damaged: a tensor has a wrong name ({error})") from error
