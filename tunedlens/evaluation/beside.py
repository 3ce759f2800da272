"""The same lenses on a second model of the same shape, such as a fine-tuned one.

On another model, a lens applies its translators to the states of that model, and then that model's
final norm and unembedding. It is compared with the distribution of that model.
"""

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tunedlens.config import ModelConfig
from tunedlens.errors import InputError
from tunedlens.evaluation.results import MODEL, Evaluation, Grids, name_on
from tunedlens.lenses import Lens, ResidualLens
from tunedlens.model import FrozenModel, load_configured

_ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder a PEFT adapter."""


class SecondModel(NamedTuple):
    """A second model, on which the same lenses are scored."""

    title: str
    """Its name in results."""
    model: FrozenModel


def second_model(
    beside: FrozenModel | str | None, config: ModelConfig, device: torch.device
) -> SecondModel | None:
    """Load the second model, if there is one.

    Args:
        beside: a loaded model; or a folder or a name on the hub, with an optional prefix `NAME=`.
            The folder of a PEFT adapter stands for the first model with that adapter.
        config: the config of the first model. The second model has the same dtype, device and
            structure.
        device: the device if the config names none.

    Raises:
        InputError: it cannot be loaded.
    """
    if beside is None:
        return None
    if isinstance(beside, FrozenModel):
        return SecondModel(Path(beside.name).name, beside)
    title, _, name = ("", "", beside) if Path(beside).exists() else beside.rpartition("=")
    if (Path(name) / _ADAPTER_CONFIG).is_file():
        config = dataclasses.replace(config, adapter=name)
    else:
        config = dataclasses.replace(
            config, model=name, revision=None, adapter=None, gguf_file=None
        )
    return SecondModel(title or Path(name).name, load_configured(config, device))


def require_comparable(model: FrozenModel, other: FrozenModel, seq_len: int | None) -> None:
    """Check that another model has the same shape and reads the same blocks of tokens.

    Raises:
        InputError: it does not; the message says what differs.
    """
    for size in ("n_layers", "d_model"):
        own, others = getattr(model.identity, size), getattr(other.identity, size)
        if own != others:
            raise InputError(
                f"{other.name} has a different shape than {model.name} ({size} {others}, "
                f"not {own}), so the same lens cannot be applied to both"
            )
    if seq_len and other.context and seq_len > other.context:
        raise InputError(
            f"--seq-len must be at most {other.context}, the context of {other.name}; got {seq_len}"
        )
    theirs = other.tokenizer.get_vocab()
    for token, number in model.tokenizer.get_vocab().items():
        if theirs.get(token) != number:
            raise InputError(
                f"{other.name} has a different vocabulary than {model.name} (for example, "
                f"{token!r} has another id), so they cannot be scored on the same text"
            )


def onto(lens: Lens, model: FrozenModel, name: str) -> Lens:
    """The lens with the norm and the unembedding of another model of the same shape.

    Its translators are shared, not copied.

    Raises:
        InputError: the lens does not decode states.
    """
    if not isinstance(lens, ResidualLens):
        raise InputError(
            f"the lens {name} does not read the states of a model, so it cannot be scored on a "
            "second model; leave it out"
        )
    # deepcopy uses these objects instead of copies of them.
    parts: dict[int, nn.Module] = {id(child): child for child in lens.children()}
    parts[id(lens.unembedding)] = model.unembedding.shared()
    moved = copy.deepcopy(lens, parts)
    moved.identity = model.identity
    return moved


def side_by_side(first: Evaluation, second: Evaluation, title: str) -> Evaluation:
    """Both evaluations of the same tokens in one; provenance is that of the first.

    Args:
        second: its lenses already have names of their own.

    Raises:
        InputError: two lenses have the same name.
    """
    assert first.tokens_sha256 == second.tokens_sha256, "not the same tokens"
    if same := set(first.lenses) & set(second.lenses):
        raise InputError(f"two lenses are called {min(same)}; choose other names")
    own_name = name_on(MODEL, title)

    by_position: Grids = {
        own_name if name == MODEL else name: grids for name, grids in second.by_position.items()
    }
    results = [
        dataclasses.replace(one, lens=own_name) if one.lens == MODEL else one
        for one in second.results
    ]
    return dataclasses.replace(
        first,
        results=first.results + results,
        constant=first.constant + second.constant,
        sites=first.sites | second.sites,
        beside=first.beside | dict.fromkeys(second.lenses, title),
        differences=first.differences + second.differences,
        by_position=first.by_position | by_position,
        transfer=first.transfer | second.transfer,
    )
