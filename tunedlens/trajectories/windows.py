"""The states of a text: rows of the model's depth, windows of the text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.model import SITES, FrozenModel
from tunedlens.trajectories.predictions import Row

_TOKENS_AT_A_TIME = 2**13
"""The number of tokens in one forward pass, including padding."""


class Piece(NamedTuple):
    """The positions of one text that are read in one window, and their states."""

    text: int
    positions: range
    states: list[Float[Tensor, "positions d_model"]]
    """By row."""


def next_ids(ids: Int[Tensor, " positions"]) -> Int[Tensor, " positions"]:
    """The true next tokens; -1 after the last one."""
    return torch.cat([ids[1:], ids.new_tensor([-1])])


def rows_of(n_layers: int, sites: Sequence[str]) -> list[Row]:
    """Rows from the first layer to the last; the model's own row is the last.

    Raises:
        InputError: there is no such site.
    """
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        raise InputError(f"sites must be of {', '.join(SITES)}; got {', '.join(unknown) or 'none'}")
    rows = [Row(site, layer) for layer in range(n_layers) for site in SITES if site in sites]
    return rows if rows[-1].site == "resid_post" else [*rows, Row("resid_pre", n_layers)]


def pieces(
    model: FrozenModel,
    texts: Sequence[Int[Tensor, " positions"]],
    rows: Sequence[Row],
    stride: int | None = None,
) -> Iterator[Piece]:
    """The states of every position of every text, each once.

    Several windows go through the model together; the shorter ones are padded at their end.

    Args:
        model: the model.
        texts: token ids.
        rows: the rows to read.
        stride: the distance between the windows of a text that is longer than the context. A
            position is read in the first window that contains it.

    Raises:
        InputError: a text is longer than the context and there is no stride, or the model has
            no such site.
    """
    waiting = [
        (text, window)
        for text, ids in enumerate(texts)
        for window in _windows(
            "the text" if len(texts) == 1 else f"text {text + 1}", len(ids), model, stride
        )
    ]
    while waiting:
        count, width = 0, 0
        for _, window in waiting:
            width = max(width, len(window.seen))
            if count and width * (count + 1) > _TOKENS_AT_A_TIME:
                break
            count += 1
        batch, waiting = waiting[:count], waiting[count:]
        seen = [texts[text][window.seen.start : window.seen.stop] for text, window in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True)
        lengths = torch.tensor([len(ids) for ids in seen])
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        found = _states(
            model, input_ids.to(model.device), None if mask.all() else mask.to(model.device), rows
        )
        for index, (text, window) in enumerate(batch):
            part = slice(window.kept.start - window.seen.start, len(window.seen))
            yield Piece(text, window.kept, [states[index, part] for states in found])


def states_of(
    model: FrozenModel, ids: Int[Tensor, " positions"], rows: Sequence[Row], stride: int | None
) -> list[Float[Tensor, "positions d_model"]]:
    """The states of a whole text, by row."""
    found = [piece.states for piece in pieces(model, [ids], rows, stride)]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


class _Window(NamedTuple):
    seen: range
    """The positions that the model reads together."""
    kept: range
    """The positions that no earlier window contains."""


def _windows(name: str, count: int, model: FrozenModel, stride: int | None) -> list[_Window]:
    context = model.context
    if stride is not None and not 1 <= stride <= (context or stride):
        raise InputError(f"stride must be between 1 and {context}, the context; got {stride}")
    if context is None or count <= context:
        return [_Window(range(count), range(count))]
    if stride is None:
        raise InputError(
            f"{name} has {count} tokens, but {model.name} reads at most {context}; shorten it, "
            f"or read it in windows with a stride of {context // 2}, which gives every position "
            f"at least {context - context // 2} tokens before it"
        )
    windows = [_Window(range(context), range(context))]
    while (end := windows[-1].seen.stop) < count:
        start = windows[-1].seen.start + stride
        last = min(start + context, count)
        windows.append(_Window(range(start, last), range(end, last)))
    return windows


def _states(
    model: FrozenModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"] | None,
    rows: Sequence[Row],
) -> list[Float[Tensor, "batch seq d_model"]]:
    sites = {row.site for row in rows}
    if sites <= {"resid_pre", "resid_post"}:
        stream = model.residual_stream(input_ids, attention_mask)
        found = {"resid_pre": stream, "resid_post": stream[1:]}
    else:
        found = model.sites(input_ids, attention_mask, sites)
    return [found[row.site][row.layer] for row in rows]
