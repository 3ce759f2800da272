"""Lenses in every format that can be read, recognised by what a path holds."""

import hashlib
import re
import warnings
from pathlib import Path
from typing import TypeVar

import huggingface_hub
import torch

from tunedlens.checkpoint.jacobian_files import (
    jacobian_model,
    read_jacobian_file,
    write_jacobian_file,
)
from tunedlens.checkpoint.lens_files import kind_of, read_lens, read_manifest
from tunedlens.checkpoint.tuned_lens_folders import (
    PARAMS,
    base_model,
    is_tuned_lens_folder,
    read_tuned_lens_folder,
    write_tuned_lens_folder,
)
from tunedlens.engine.distributions import kl_divergence, log_probs
from tunedlens.errors import InputError, first_line
from tunedlens.files import JsonObject
from tunedlens.lenses import AffineLens, JacobianLens, LogitLens, TunedLens
from tunedlens.model import FrozenModel, probe_ids

Kind = TypeVar("Kind", bound=AffineLens)

_ON_HUB = re.compile(r"(model|space|dataset):([^/:]+/[^/]+)/(.+?)/?")


def load_lens(path: str | Path, model: FrozenModel, *, check: bool = True) -> AffineLens:
    """Read a lens of any kind that was made for this model.

    What the path holds decides the format. Nothing in a file is run.

    Args:
        path: a folder that `train.py` or `save_lens` has written, a folder with a lens of the
            library `tuned-lens`, a `.pt` file with a Jacobian lens of TransformerLens 4 or `jlens`,
            or such a folder or file on the Hugging Face hub, as TYPE:OWNER/REPOSITORY/PATH with
            TYPE model, space or dataset.
        check: whether to warn if the model's predictions have changed since the lens was made or,
            for a tuned lens of another library, if it is farther from the model than the logit
            lens on a short text.

    Raises:
        InputError: there is no lens, it is damaged, or it belongs to another model.
    """
    path = local_path(path)
    if path.is_file():
        return read_jacobian_file(path, model)
    if not is_tuned_lens_folder(path):
        return read_lens(path, model, check=check)
    lens = read_tuned_lens_folder(path, model)
    if check:
        _warn_if_far(lens, model, path)
    return lens


def load_lens_of_kind(
    kind: type[Kind], path: str | Path, model: FrozenModel, *, check: bool = True
) -> Kind:
    """Read a lens of one kind that was made for this model; the rest is as in `load_lens`.

    Raises:
        InputError: there is no lens, it is damaged or of another kind, or it belongs to
            another model (other width, depth, vocabulary, norm or unembedding).
    """
    lens = load_lens(path, model, check=check)
    if not isinstance(lens, kind):
        raise InputError(f"{path} holds a {kind_of(lens)} lens, not a {kind.__name__}")
    return lens


def describe_lens(path: str | Path) -> JsonObject:
    """What a lens says of itself, without its model.

    Returns:
        The manifest of a lens in our format. For one of another library: its kind as `lens`, the
        name and the revision of its `model` (None if unknown), and `lens_sha256`.

    Raises:
        InputError: there is no lens, or it is damaged.
    """
    path = local_path(path)
    if path.is_file():
        kind, about, weights = "jacobian", jacobian_model(path), path
    elif is_tuned_lens_folder(path):
        kind, about, weights = "tuned", base_model(path), path / PARAMS
    else:
        return read_manifest(path)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return {"lens": kind, "model": about, "lens_sha256": digest}


def export_lens(lens: AffineLens, path: str | Path) -> None:
    """Write a lens for other libraries; `load_lens` reads it too.

    Args:
        path: for a tuned lens, a folder: it gets `config.json` and `params.pt`, which the library
            `tuned-lens` reads. For a Jacobian lens, a `.pt` file, which TransformerLens 4 and
            `jlens` read.

    Raises:
        InputError: the format has no place for something in the lens, the folder holds something
            else, or the path cannot be written.
    """
    path = Path(path)
    if isinstance(lens, TunedLens):
        if (path / "config.json").is_file() and not is_tuned_lens_folder(path):
            raise InputError(f"{path} holds another config.json; choose another folder")
        write_tuned_lens_folder(lens, path)
    elif isinstance(lens, JacobianLens):
        if path.suffix != ".pt":
            raise InputError(f"expected a name that ends in .pt for a Jacobian lens, got {path}")
        write_jacobian_file(lens, path)
    else:
        raise InputError(f"only a tuned or a Jacobian lens can be exported, not a {kind_of(lens)}")


def local_path(path: str | Path) -> Path:
    """The path itself or, for a lens on the hub, that of its downloaded copy.

    Raises:
        InputError: the hub cannot be reached or has no such lens.
    """
    found = _ON_HUB.fullmatch(str(path))
    if found is None:
        return Path(path)
    repo_type, repo_id, inside = found.groups()
    try:
        snapshot = huggingface_hub.snapshot_download(
            repo_id, repo_type=repo_type, allow_patterns=[inside, f"{inside}/*"]
        )
    except Exception as error:  # the hub's client raises many kinds of exception
        raise InputError(f"cannot download {path}: {first_line(error)}") from error
    if not (local := Path(snapshot) / inside).exists():
        raise InputError(f"the {repo_type} {repo_id} on the hub has no {inside}")
    return local


@torch.no_grad()
def _warn_if_far(lens: AffineLens, model: FrozenModel, path: Path) -> None:
    """Warn if the mean KL over layers is greater than the logit lens's on a short text."""
    *states, final = model.residual_stream(probe_ids(model))
    target = log_probs(model.unembedding(final))

    def mean_kl(one: AffineLens | LogitLens) -> float:
        by_layer = [
            kl_divergence(target, log_probs(one(state, layer))).mean()
            for layer, state in enumerate(states)
        ]
        return float(torch.stack(by_layer).mean())

    own, without = mean_kl(lens), mean_kl(LogitLens.from_model(model))
    if own > without:
        warnings.warn(
            f"the lens in {path} is farther from {model.name} than the logit lens on a short text "
            f"(mean KL {own:.3g} nats instead of {without:.3g}): it was probably made for another "
            "model",
            stacklevel=3,
        )
