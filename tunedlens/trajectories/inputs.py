"""The arguments of `trajectory` and `compare`: lenses, texts and tokens, checked."""

import operator
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.lenses import LogitLens, ResidualLens, require_made_for
from tunedlens.model import FrozenModel
from tunedlens.tokenizer import as_text

Text = str | list[int] | Int[Tensor, " positions"]
Texts = list[str] | list[list[int]] | list[Tensor] | tuple[Text, ...]
Lenses = ResidualLens | Sequence[ResidualLens] | Mapping[str, ResidualLens] | None
Tokens = str | int | Sequence[str | int]


def named_lenses(
    model: FrozenModel, lenses: Lenses, sites: Sequence[str]
) -> dict[str, ResidualLens]:
    """Lenses by name, once it is certain that they fit the model and can read the sites.

    Raises:
        InputError: there is none, two have one name, or one does not fit.
    """
    if lenses is None:
        return {"logit": LogitLens.from_model(model)}
    if isinstance(lenses, ResidualLens):
        lenses = [lenses]
    if not lenses:
        raise InputError("there is no lens to read with; give one, or None for the logit lens")
    if isinstance(lenses, Mapping):
        pairs = list(lenses.items())
    else:
        pairs = [(type(lens).__name__.removesuffix("Lens").lower(), lens) for lens in lenses]
    for name, lens in pairs:
        if not isinstance(lens, ResidualLens):
            raise InputError(
                f"the lens {name} is a {type(lens).__name__}, which reads no state of a text; "
                "expected lenses that equal the model at the last state"
            )
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise InputError(
            f"there are several lenses of one kind ({', '.join(names)}); give a dict that names "
            "them"
        )
    require_made_for(model, dict(pairs))
    inside = [site for site in sites if site not in ("resid_pre", "resid_post")]
    for name, lens in pairs:
        if inside and not isinstance(lens, LogitLens):
            raise InputError(
                f"the lens {name} has translators for the stream between blocks only, not for "
                f"{', '.join(inside)}; read these with the logit lens alone"
            )
    return dict(pairs)


def is_single(text: Text | Texts) -> TypeGuard[Text]:
    """Whether it is one text rather than a list of texts."""
    return isinstance(text, (str, Tensor)) or (
        isinstance(text, (list, tuple)) and len(text) > 0 and isinstance(text[0], int)
    )


def texts_of(model: FrozenModel, text: Text | Texts) -> list[Int[Tensor, " positions"]]:
    """The token ids of every text, on the CPU.

    Raises:
        InputError: a text cannot be read.
    """
    if is_single(text):
        return [token_ids(model, text)]
    if not isinstance(text, (list, tuple)):
        raise InputError(
            f"expected a text, its token ids, or a list of texts; got {type(text).__name__}"
        )
    if not text:
        raise InputError("there is no text to read; give at least one")
    several: Sequence[Text] = text  # type: ignore[assignment]  # a TypeGuard does not narrow
    return [token_ids(model, one) for one in several]


def token_ids(model: FrozenModel, text: Text) -> Int[Tensor, " positions"]:
    """The token ids of a text of any length, on the CPU.

    Raises:
        InputError: there are none, or some are not tokens of the model.
    """
    if isinstance(text, str):
        return model.encode(text, is_any_length=True)[0].cpu()
    ids = torch.as_tensor(text)
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise InputError(
            f"the ids of a text must be whole numbers in one row, got {ids.dtype} of shape "
            f"{tuple(ids.shape)}"
        )
    vocab_size = model.identity.vocab_size
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise InputError(
            f"token ids must be between 0 and {vocab_size - 1}, got {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    return ids.cpu().long()


def tracked_tokens(model: FrozenModel, tokens: Tokens) -> tuple[list[int], dict[str, int]]:
    """The ids of tokens, and those that were given as text by their text.

    Raises:
        InputError: there is no such id, or a text is several tokens.
    """
    several = [tokens] if isinstance(tokens, str) or not isinstance(tokens, Sequence) else tokens
    ids = [_single_id(model, token) for token in several]
    names = {token: i for token, i in zip(several, ids, strict=True) if isinstance(token, str)}
    return ids, names


def _single_id(model: FrozenModel, token: str | int) -> int:
    if not isinstance(token, str):
        vocab_size = model.identity.vocab_size
        try:
            token = operator.index(token)
        except TypeError:
            raise InputError(f"expected a token as text or id, got {token!r}") from None
        if not 0 <= token < vocab_size:
            raise InputError(f"a token id must be between 0 and {vocab_size - 1}, got {token}")
        return token
    ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = ", ".join(repr(as_text(model.tokenizer, i)) for i in ids)
        raise InputError(
            f"{token!r} is {len(ids)} tokens ({parts}); track one of them, or give it with or "
            "without the space before it"
        )
    return ids[0]
