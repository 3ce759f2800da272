"""Tuned lenses in the format of AlignmentResearch's library `tuned-lens`.

A lens is a folder with `config.json` and `params.pt`. From release 0.1.0 on, `params.pt` holds
`<layer>.weight` and `<layer>.bias` of translators of the form h + A h + b, and a layer is counted
as here. Up to 0.0.5 it holds a copy of the final norm and the unembedding too, and the translators
are named `input_translator` (layer 0) and `layer_translators.<layer - 1>`; still earlier files say
`probe` or `adapter` instead of `translator`.

Source:
    https://github.com/AlignmentResearch/tuned-lens, `tuned_lens/nn/lenses.py`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from tunedlens.checkpoint.pt_files import checked, read_pt, write_pt
from tunedlens.errors import InputError
from tunedlens.files import JsonObject, read_json, write_json
from tunedlens.lenses import TunedLens
from tunedlens.model import FrozenModel

CONFIG = "config.json"
PARAMS = "params.pt"


def is_tuned_lens_folder(path: Path) -> bool:
    """Whether a folder holds a lens of the library `tuned-lens`, of any release."""
    if not all(os.path.isfile(path / name) for name in (PARAMS, CONFIG)):
        return False
    config = read_json(path / CONFIG)
    return isinstance(config, dict) and "d_model" in config and "lens" not in config


def base_model(folder: Path) -> JsonObject:
    """The name and the revision of the model that a lens was made for, if its config has them.

    Raises:
        InputError: the config is damaged.
    """
    config = read_json(folder / CONFIG)
    old = config.get("model_config")
    old_name = old.get("_name_or_path") if isinstance(old, dict) else None
    return {
        "name": config.get("base_model_name_or_path") or old_name,
        "revision": config.get("base_model_revision"),
    }


def read_tuned_lens_folder(folder: Path, model: FrozenModel) -> TunedLens:
    """Read a lens that the library `tuned-lens` has written.

    The hash of the unembedding in the folder is not compared. It is the hash of a text with the
    first and the last values, so it depends on the version of numpy and misses most changes.

    Raises:
        InputError: a file is damaged, a shape is not the model's, or the lens has additional layers
            or its own unembedding.
    """
    config = read_json(folder / CONFIG)
    if config.get("extra_layers") or not config.get("reuse_unembedding", True):
        raise InputError(
            f"the lens in {folder} has additional layers or its own unembedding (extra_layers, "
            "reuse_unembedding); only lenses with the model's unembedding can be read"
        )
    if config.get("lens_type", "linear_tuned_lens") != "linear_tuned_lens":
        raise InputError(f"{folder} has a {config['lens_type']}, expected a linear_tuned_lens")
    path = folder / PARAMS
    params = read_pt(path)
    if not isinstance(params, dict) or not all(isinstance(name, str) for name in params):
        raise InputError(f"{path} must be a dict of tensors by name, got {type(params).__name__}")
    if any(name.startswith("unembedding.") for name in params):
        _require_same_unembedding(params, model, path)
        params = _renamed(params)
    lens = TunedLens.from_model(model)
    has_bias = any(name.endswith(".bias") for name in params)
    names = ("weight", "bias") if has_bias else ("weight",)
    expected = {f"{layer}.{name}" for layer in range(lens.n_layers) for name in names}
    if params.keys() != expected:
        wrong = sorted(params.keys() ^ expected)
        raise InputError(
            f"{path} does not fit {model.name}: expected translators of {lens.n_layers} layers, "
            f"got {len(params) // len(names)} (wrong: {', '.join(wrong[:4])})"
        )
    with torch.no_grad():
        for layer in range(lens.n_layers):
            for name in names:
                key = f"{layer}.{name}"
                target = getattr(lens.translator(layer), name)
                target.copy_(checked(params[key], tuple(target.shape), f"{key} in {path}"))
    return lens


def _require_same_unembedding(params: Mapping[str, object], model: FrozenModel, path: Path) -> None:
    """Compare the copy of the final norm and the unembedding in an old file with the model's.

    Raises:
        InputError: they differ by more than half precision explains.
    """
    own = {"unembedding.weight": model.unembedding.weight}
    own |= {f"layer_norm.{name}": value for name, value in model.unembedding.norm.named_buffers()}
    for name, value in own.items():
        saved = checked(params.get(name), tuple(value.shape), f"{name} in {path}")
        if not torch.allclose(saved, value.float().cpu(), rtol=1e-2, atol=1e-3):
            raise InputError(f"{path} was made for another model than {model.name}: {name} differs")


def _renamed(params: Mapping[str, object]) -> dict[str, object]:
    """The translators of an old file with the names that releases since 0.1.0 use."""
    renamed = {}
    for name, value in params.items():
        new = re.sub("probe|adapter", "translator", name)
        if match := re.fullmatch(r"layer_translators\.(\d+)\.(weight|bias)", new):
            renamed[f"{int(match[1]) + 1}.{match[2]}"] = value
        elif new.startswith("input_translator."):
            renamed[f"0.{new.partition('.')[2]}"] = value
        elif not new.startswith(("layer_norm.", "unembedding.")):
            renamed[new] = value
    return renamed


def write_tuned_lens_folder(lens: TunedLens, folder: Path) -> None:
    """Write a lens so that the library `tuned-lens` (0.1.0 or later) reads it.

    No hash of the unembedding is written, so that library compares none.

    Raises:
        InputError: the folder cannot be written.
    """
    layers = range(lens.n_layers)
    params = {
        f"{layer}.{name}": getattr(lens.translator(layer), name).detach().cpu().contiguous()
        for layer in layers
        for name in ("weight", "bias")
    }
    write_pt(folder / PARAMS, params)
    config = {
        "base_model_name_or_path": lens.identity.name,
        "base_model_revision": lens.identity.revision,
        "d_model": lens.identity.d_model,
        "num_hidden_layers": lens.n_layers,
        "bias": True,
        "unembed_hash": None,
        "lens_type": "linear_tuned_lens",
    }
    write_json(folder / CONFIG, config)
