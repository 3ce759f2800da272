"""Lenses on disk: safetensors for the translators, JSON for what made them."""

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from tunedlens.checkpoint.manifest import FORMAT, MANIFEST, WEIGHTS, read_manifest
from tunedlens.errors import InputError
from tunedlens.files import (
    JsonObject,
    newest_folder,
    now,
    read_tensor_names,
    read_tensors,
    require_finite,
    write,
    write_json,
)
from tunedlens.lenses import AffineLens, JacobianLens, TunedLens
from tunedlens.model import FrozenModel, probe_kl, probe_tolerance, require_same_model

ROOT = Path("checkpoints")
"""The default folder of runs."""
KINDS: dict[str, type[AffineLens]] = {"tuned": TunedLens, "jacobian": JacobianLens}
"""The kinds of lens that can be saved, by their names in a manifest (`manifest.Kind`)."""


def save_lens(
    lens: AffineLens, folder: str | Path, metadata: Mapping[str, object] | None = None
) -> None:
    """Write a lens: first its translators, then the manifest with their hash.

    Args:
        folder: created if it does not exist; a lens in it is replaced.
        metadata: further entries of the manifest (config, corpus, results).

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
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
    lens = KINDS[manifest["lens"]].from_model(model, manifest.get("sites", ["resid_pre"]))
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

    Args:
        any_model: accept a lens that was made for another model of the same shape.

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
    # A translator whose weight is zero everywhere is saved as its bias.
    omitted = {name for name in expected.keys() - tensors.keys() if name.endswith(".weight")}
    tensors |= {name: torch.zeros_like(expected[name]) for name in omitted}
    if (wrong := expected.keys() ^ tensors.keys()) or (
        wrong := {name for name, value in tensors.items() if value.shape != expected[name].shape}
    ):
        raise InputError(
            f"{path} does not hold {len(expected)} tensors for {lens.n_layers} layers of width "
            f"{lens.identity.d_model}: {min(wrong)} is missing, not expected, or of another shape"
        )
    require_finite(tensors, path)
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


def saved_sites(folder: Path) -> list[str]:
    """The sites at which a saved lens has translators, from the header of its file.

    Raises:
        InputError: the file is missing or damaged.
    """
    names = read_tensor_names(folder / WEIGHTS)
    return list(dict.fromkeys(name.partition(".")[0] for name in names))
