"""Jacobian lenses in the format of `jlens`, TransformerLens 4 and neuronpedia/jacobian-lens.

A lens is one `.pt` file with a dict. Its `J` holds a matrix by the number of a block: `J[l]` maps
the output of block l, which is state l + 1 here, to the output of the last block. So a complete
file of a model with n blocks has the matrices 0 to n - 2, for our states 1 to n - 1; a sparse one
has some of them. There is none for state 0, the embeddings.

Files written here have an additional matrix for state 0 under `J_embeddings`, if the lens has a
translator there; the other libraries ignore it.

Source:
    https://github.com/TransformerLensOrg/TransformerLens,
    `transformer_lens/tools/analysis/jacobian_lens.py`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from tunedlens.checkpoint.pt_files import checked, read_pt, write_pt
from tunedlens.errors import InputError
from tunedlens.files import JsonObject
from tunedlens.lenses import JacobianLens
from tunedlens.model import FrozenModel

_EMBEDDINGS = "J_embeddings"


def jacobian_model(path: Path) -> JsonObject:
    """The name and the revision of the model that a lens was made for, if its file records them.

    Raises:
        InputError: the file is damaged or holds no Jacobian lens.
    """
    about = _about(_payload(path))
    return {"name": about.get("model_name"), "revision": about.get("model_revision")}


def read_jacobian_file(path: Path, model: FrozenModel) -> JacobianLens:
    """Read a lens that another library has written.

    The lens has translators at the layers whose Jacobians are in the file.

    Raises:
        InputError: the file is damaged, a shape is not the model's, a block is not one of the
            model's, or the matrices map to another layer than the last one.
    """
    payload = _payload(path)
    d_model, n_layers = model.identity.d_model, model.identity.n_layers
    shape = (d_model, d_model)
    found = {
        _block(key, path): checked(matrix, shape, f"J[{key}] in {path}")
        for key, matrix in payload["J"].items()
    }
    if not found or max(found) > n_layers - 2:
        raise InputError(
            f"{path} has Jacobians for the outputs of blocks {_short(found)} of {model.name}: "
            f"expected blocks between 0 and {n_layers - 2}"
        )
    target = _about(payload).get("target_layer", n_layers - 1)
    if target != n_layers - 1:
        raise InputError(
            f"the Jacobians in {path} map to the output of block {target}, expected the last block "
            f"of {model.name}, {n_layers - 1}; fit them again without a target layer"
        )
    by_layer = {block + 1: matrix for block, matrix in found.items()}
    if _EMBEDDINGS in payload:
        by_layer[0] = checked(payload[_EMBEDDINGS], shape, f"{_EMBEDDINGS} in {path}")
    layers = sorted(by_layer)
    jacobians = torch.stack([by_layer[layer] for layer in layers])
    return JacobianLens.from_jacobians(model, jacobians, layers)


def write_jacobian_file(lens: JacobianLens, path: Path) -> None:
    """Write a lens so that TransformerLens 4 and `jlens` read it, in float32.

    The number of prompts is written as 0, which is how TransformerLens reads an unknown one.

    Raises:
        InputError: a translator has a bias, which the format cannot hold; there is no translator
            after layer 0; or the file cannot be written.
    """
    identity = torch.eye(lens.identity.d_model)
    matrices = {}
    for layer in lens.layers:
        translator = lens.translator(layer)
        if translator.bias.any():
            raise InputError(
                f"layer {layer} of the lens has a bias, which the format of Jacobian lenses cannot "
                "hold"
            )
        matrices[layer - 1] = translator.weight.detach().cpu() + identity
    embeddings = matrices.pop(-1, None)
    if not matrices:
        raise InputError(
            "the lens has a translator at layer 0 only; the format of Jacobian lenses needs one at "
            "a later layer"
        )
    payload = {
        "J": matrices,
        "n_prompts": 0,
        "source_layers": list(matrices),
        "d_model": lens.identity.d_model,
        # These are not in the metadata, because TransformerLens refuses a lens whose metadata spell
        # the model's name in another way than it does.
        "model_name": lens.identity.name,
        "model_revision": lens.identity.revision,
        "metadata": {"target_layer": lens.n_layers - 1},
    }
    if embeddings is not None:
        payload[_EMBEDDINGS] = embeddings
    write_pt(path, payload)


def _payload(path: Path) -> JsonObject:
    """The dict in a file, which holds matrices and otherwise plain values."""
    payload = read_pt(path)
    if not isinstance(payload, dict) or not isinstance(payload.get("J"), dict):
        raise InputError(
            f"{path} is not a Jacobian lens: expected a dict with matrices by block under J"
        )
    return payload


def _about(payload: JsonObject) -> JsonObject:
    """The entries of a file besides its matrices, at the top level or under `metadata`."""
    metadata = payload.get("metadata")
    return payload | (metadata if isinstance(metadata, dict) else {})


def _block(key: object, path: Path) -> int:
    if isinstance(key, int | str) and str(key).isdecimal():
        return int(key)
    raise InputError(f"{path} has a Jacobian for {key!r}, expected the number of a block")


def _short(found: Mapping[int, object]) -> str:
    blocks = sorted(found)
    if blocks == list(range(len(blocks))) and len(blocks) > 1:
        return f"0 to {len(blocks) - 1}"
    return ", ".join(map(str, blocks)) or "none"
