"""Reads and writes lenses in all supported formats; the content of a path decides the format."""

import hashlib
import os
import warnings
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from tunedlens.checkpoint.hub import local_path
from tunedlens.checkpoint.jacobian_files import (
    jacobian_model,
    read_jacobian_file,
    write_jacobian_file,
)
from tunedlens.checkpoint.lens_files import ROOT, kind_of, read_lens, those_under
from tunedlens.checkpoint.manifest import MANIFEST, WEIGHTS, read_manifest
from tunedlens.checkpoint.tuned_lens_folders import (
    CONFIG,
    PARAMS,
    base_model,
    is_tuned_lens_folder,
    read_tuned_lens_folder,
    write_tuned_lens_folder,
)
from tunedlens.engine import kl_by_layer
from tunedlens.errors import InputError
from tunedlens.files import JsonObject, read_bytes
from tunedlens.lenses import AffineLens, JacobianLens, LogitLens, TunedLens
from tunedlens.model import FrozenModel, probe_ids

Kind = TypeVar("Kind", bound=AffineLens)


def find_lens(
    source: str | Path, subfolder: str | None = None, revision: str | None = None
) -> Path:
    """The folder or file of a lens; a lens on the hub is downloaded. See `hub.local_path`.

    Raises:
        InputError: there is none; the message lists the saved lenses.
    """
    formats = ((MANIFEST, WEIGHTS), (CONFIG, PARAMS))
    try:
        path = local_path(source, formats, subfolder=subfolder, revision=revision)
    except InputError as error:
        raise InputError(f"{error}{those_under(ROOT)}") from error
    if not os.path.exists(path):
        raise InputError(f"{path} holds no lens: there is no such path{those_under(ROOT)}")
    return path


def load_lens(
    source: str | Path,
    model: FrozenModel,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    check: bool = True,
) -> AffineLens:
    """Read a lens of any kind that was made for this model.

    The content of the source decides the format. No code in a file is run.

    Args:
        source: a folder written by `train` or `lens.save`; a folder with a lens of the library
            `tuned-lens`; a `.pt` file with a Jacobian lens of TransformerLens 4 or `jlens`; or the
            name of such a folder or file on the hub, `[space:]user/name[@revision][:subfolder]`.
        model: the model that the lens was made for.
        subfolder: the folder or `.pt` file of the lens within `source`.
        revision: branch, tag or commit on the hub.
        check: whether to warn if the model's predictions have changed since the lens was made. For
            a tuned lens of another library, whether to warn if its KL on a short text is higher
            than that of the logit lens.

    Raises:
        InputError: there is no lens, it is damaged, it belongs to another model, or the hub
            cannot be reached.
    """
    path = find_lens(source, subfolder, revision)
    if os.path.isfile(path):
        return read_jacobian_file(path, model)
    if not is_tuned_lens_folder(path):
        return read_lens(path, model, check=check)
    lens = read_tuned_lens_folder(path, model)
    if check:
        _warn_if_far(lens, model, path)
    return lens


def load_lens_of_kind(
    kind: type[Kind],
    source: str | Path,
    model: FrozenModel,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    check: bool = True,
) -> Kind:
    """Read a lens of one kind that was made for this model; see `load_lens`.

    Raises:
        InputError: there is no lens, it is damaged or of another kind, or it belongs to
            another model (other width, depth, vocabulary, norm or unembedding).
    """
    lens = load_lens(source, model, subfolder=subfolder, revision=revision, check=check)
    if not isinstance(lens, kind):
        raise InputError(f"{source} holds a {kind_of(lens)} lens, not a {kind.__name__}")
    return lens


def describe_lens(path: Path) -> JsonObject:
    """The description of a saved lens, read without its model.

    Args:
        path: as `find_lens` returns it.

    Returns:
        The manifest of a lens in our format. For one of another library: its kind as `lens`, the
        name and the revision of its `model` (None if unknown), and `lens_sha256`.

    Raises:
        InputError: there is no lens, or it is damaged.
    """
    if os.path.isfile(path):
        kind, about, weights = "jacobian", jacobian_model(path), path
    elif is_tuned_lens_folder(path):
        kind, about, weights = "tuned", base_model(path), path / PARAMS
    else:
        return read_manifest(path)
    digest = hashlib.sha256(read_bytes(weights)).hexdigest()
    made_for = {key: value if isinstance(value, str) else None for key, value in about.items()}
    return {"lens": kind, "model": made_for, "lens_sha256": digest}


def export_lens(lens: AffineLens, path: str | Path) -> None:
    """Write a lens in the format of another library; `load_lens` reads it too.

    Args:
        path: for a tuned lens, a folder for `config.json` and `params.pt`, which the library
            `tuned-lens` reads. For a Jacobian lens, a `.pt` file, which TransformerLens 4 and
            `jlens` read.

    Raises:
        InputError: the format does not support something in the lens, the folder holds another
            `config.json`, or the path cannot be written.
    """
    path = Path(path)
    if lens.sites != ("resid_pre",):
        raise InputError(
            f"other libraries read translators at resid_pre only; this lens has some at "
            f"{', '.join(lens.sites)}"
        )
    if isinstance(lens, TunedLens) and len(lens.layers) < lens.n_layers:
        raise InputError(
            f"the library tuned-lens needs translators at all {lens.n_layers} layers; this lens "
            f"has them at {', '.join(map(str, lens.layers))}"
        )
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


def _warn_if_far(lens: AffineLens, model: FrozenModel, path: Path) -> None:
    """Warn if the mean KL over layers is greater than the logit lens's on a short text."""
    states = model.residual_stream(probe_ids(model))
    own, without = (
        fmean(kl_by_layer(one, model.unembedding, states).values())
        for one in (lens, LogitLens.from_model(model))
    )
    if own > without:
        warnings.warn(
            f"the lens in {path} is farther from {model.name} than the logit lens on a short text "
            f"(mean KL {own:.3g} nats instead of {without:.3g}): it was probably made for another "
            "model",
            stacklevel=3,
        )
