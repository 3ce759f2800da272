"""Checks the arguments of `trajectory` and `compare`: lenses, texts and tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens import checkpoint
from tunedlens.errors import InputError
from tunedlens.lenses import LogitLens, ResidualLens, require_made_for
from tunedlens.model import FrozenModel
from tunedlens.tokenizer import as_text
from tunedlens.trajectories.result import Tokens, as_id, as_list

Text = str | list[int] | Int[Tensor, " positions"]
Texts = list[str] | list[list[int]] | list[Tensor] | tuple[Text, ...]
OneLens = ResidualLens | str | Path
"""A lens, the path or the name on the hub of a saved one, or `logit`."""
Lenses = OneLens | Sequence[OneLens] | Mapping[str, OneLens] | None


def named_lenses(model: FrozenModel, lenses: Lenses) -> dict[str, ResidualLens]:
    """Lenses by name, read if they are saved, and checked to fit the model.

    Saved lenses of one kind are called by the last parts of their paths.
    """
    if lenses is None:
        return {"logit": LogitLens.from_model(model)}
    if isinstance(lenses, str) or not isinstance(lenses, Sequence | Mapping):
        lenses = [lenses]
    if not lenses:
        raise InputError("the list of lenses is empty; give a lens, or None for the logit lens")
    if isinstance(lenses, Mapping):
        pairs = [(name, _opened(model, one)) for name, one in lenses.items()]
    else:
        opened = [_opened(model, one) for one in lenses]
        kinds = [getattr(lens, "kind_name", type(lens).__name__) for lens in opened]
        titles = [
            Path(one).name if isinstance(one, str | Path) and kinds.count(kind) > 1 else kind
            for one, kind in zip(lenses, kinds, strict=True)
        ]
        pairs = list(zip(titles, opened, strict=True))
    for name, lens in pairs:
        if not isinstance(lens, ResidualLens):
            raise InputError(
                f"the lens {name} is a {type(lens).__name__}, which does not read the states of a "
                "text; expected lenses that equal the model at the last state"
            )
    named = dict(pairs)
    if len(named) < len(pairs):
        names = ", ".join(name for name, _ in pairs)
        raise InputError(
            f"there are several lenses of one kind ({names}); give a dict that names them"
        )
    require_made_for(model, named)
    return named


def _opened(model: FrozenModel, lens: OneLens) -> ResidualLens:
    if not isinstance(lens, str | Path):
        return lens
    return LogitLens.from_model(model) if lens == "logit" else checkpoint.load_lens(lens, model)


def texts_of(
    model: FrozenModel, text: Text | Texts
) -> tuple[list[Int[Tensor, " positions"]], bool]:
    """The token ids of every text, and whether it is one text rather than a list of texts."""
    if isinstance(text, (str, Tensor)):
        return [token_ids(model, text)], True
    if not isinstance(text, (list, tuple)):
        raise InputError(
            f"expected a text, its token ids, or a list of texts; got {type(text).__name__}"
        )
    if not text:
        raise InputError("the list of texts is empty; give at least one text")
    if isinstance(text[0], int):
        return [token_ids(model, text)], True
    return [token_ids(model, one) for one in text], False


def token_ids(model: FrozenModel, text: Text) -> Int[Tensor, " positions"]:
    """The token ids of a text of any length, on the CPU."""
    if isinstance(text, str):
        return model.encode(text, is_any_length=True)[0].cpu()
    ids = torch.as_tensor(text)
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise InputError(
            f"the ids of a text must be whole numbers in one row, got {ids.dtype} of shape "
            f"{tuple(ids.shape)}"
        )
    least, largest = int(ids.min()), int(ids.max())
    last = model.identity.vocab_size - 1
    if not 0 <= least <= largest <= last:
        raise InputError(f"token ids must be between 0 and {last}, got {least} to {largest}")
    return ids.cpu().long()


def tracked_tokens(model: FrozenModel, tokens: Tokens) -> tuple[list[int], dict[str, int]]:
    """The ids of tokens, and those that were given as text by their text."""
    several = as_list(tokens)
    ids = [_single_id(model, token) for token in several]
    names = {token: i for token, i in zip(several, ids, strict=True) if isinstance(token, str)}
    return ids, names


def _single_id(model: FrozenModel, token: str | int) -> int:
    if not isinstance(token, str):
        token_id, last = as_id(token), model.identity.vocab_size - 1
        if not 0 <= token_id <= last:
            raise InputError(f"a token id must be between 0 and {last}, got {token_id}")
        return token_id
    ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = ", ".join(repr(as_text(model.tokenizer, i)) for i in ids)
        raise InputError(
            f"expected one token, but {token!r} is {len(ids)} tokens ({parts}); track one of them, "
            "or add or remove the space before it"
        )
    return ids[0]
