"""Computes the states of texts, in windows if a text is longer than the context."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.lenses import ResidualLens
from tunedlens.model import SITES, FrozenModel
from tunedlens.trajectories.result import Row

_TOKENS_AT_A_TIME = 2**13
"""The number of tokens in one forward pass, including padding."""


class Piece(NamedTuple):
    """The positions of one text that are read in one window, and their states."""

    text: int
    positions: range
    states: list[Float[Tensor, "positions d_model"]]
    """By row."""


class _Window(NamedTuple):
    seen: list[int]
    """The positions that the model reads together. If the text begins with BOS, every window
    does."""
    kept: range
    """The positions that no earlier window contains: the last ones of `seen`."""


def next_ids(ids: Int[Tensor, " positions"]) -> Int[Tensor, " positions"]:
    """The true next tokens; -1 after the last one."""
    return torch.cat([ids[1:], ids.new_tensor([-1])])


def rows_of(
    n_layers: int, sites: str | Sequence[str], lenses: Mapping[str, ResidualLens]
) -> list[Row]:
    """Rows that all lenses read, from the first layer to the last; the last is the model's own.

    Raises:
        InputError: there is no such site, a lens reads no layer of one, or no layer is read by all.
    """
    sites = [sites] if isinstance(sites, str) else sites
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        names = ", ".join(unknown) or "none"
        raise InputError(f"sites must be some of {', '.join(SITES)}; got {names}")
    rows = [Row(site, layer) for layer in range(n_layers) for site in SITES if site in sites]
    last = rows.pop() if rows[-1].site == "resid_post" else Row("resid_pre", n_layers)
    for name, lens in lenses.items():
        read = {row.site for row in rows if lens.reads(row.site, row.layer)}
        if unread := sorted({row.site for row in rows} - read):
            raise InputError(
                f"the lens {name} has no translators for {', '.join(unread)}; train it with "
                f"--sites {','.join(unread)}, or read these with the logit lens"
            )
    shared = [
        row for row in rows if all(lens.reads(row.site, row.layer) for lens in lenses.values())
    ]
    if rows and not shared:
        raise InputError(
            f"the lenses {', '.join(lenses)} have no layer with translators in common; read the "
            "text with each lens separately"
        )
    return [*shared, last]


def pieces(
    model: FrozenModel,
    texts: Sequence[Int[Tensor, " positions"]],
    rows: Sequence[Row],
    stride: int | None,
) -> Iterator[Piece]:
    """The states of every position of every text, each once.

    A text that is longer than the context is read in windows that start `stride` tokens apart;
    each position is read in the first window that contains it. Several windows go through the
    model together; the shorter ones are padded at their end.

    Raises:
        InputError: a text is longer than the context and there is no stride, or the model has
            no such site.
    """
    names = ["the text"] if len(texts) == 1 else [f"text {i + 1}" for i in range(len(texts))]
    waiting = [
        (text, window)
        for text, (name, ids) in enumerate(zip(names, texts, strict=True))
        for window in _windows(name, ids, model, stride)
    ]
    while waiting:
        count, width = 0, 0
        for _, window in waiting:
            width = max(width, len(window.seen))
            if count and width * (count + 1) > _TOKENS_AT_A_TIME:
                break
            count += 1
        batch, waiting = waiting[:count], waiting[count:]
        states = _states(model, [texts[text][window.seen] for text, window in batch], rows)
        for index, (text, (seen, kept)) in enumerate(batch):
            part = slice(len(seen) - len(kept), len(seen))
            yield Piece(text, kept, [state[index, part] for state in states])


def _windows(
    name: str, ids: Int[Tensor, " positions"], model: FrozenModel, stride: int | None
) -> list[_Window]:
    context, count = model.context, len(ids)
    if stride is not None and not 1 <= stride <= (context or stride):
        raise InputError(f"stride must be between 1 and {context}, the context; got {stride}")
    if context is None or count <= context:
        return [_Window(list(range(count)), range(count))]
    if stride is None:
        raise InputError(
            f"{name} has {count} tokens, but {model.name} reads at most {context}; shorten it, "
            f"or read it in windows with a stride of {context // 2}, which gives every position "
            f"at least {context - context // 2} tokens before it"
        )
    starts = range(0, count - context + stride, stride)
    seen = [range(start, min(start + context, count)) for start in starts]
    ends = pairwise([0, *(window.stop for window in seen)])
    has_bos = model.bos_id is not None and int(ids[0]) == model.bos_id
    return [
        _Window([0, *one[1:]] if has_bos else list(one), range(*kept))
        for one, kept in zip(seen, ends, strict=True)
    ]


def _states(
    model: FrozenModel, texts: list[Int[Tensor, " positions"]], rows: Sequence[Row]
) -> list[Float[Tensor, "texts longest d_model"]]:
    """One forward pass."""
    input_ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)
    lengths = torch.tensor([len(ids) for ids in texts], device=model.device)
    mask = (torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]).long()
    attention_mask = None if len(lengths.unique()) == 1 else mask
    return model.states_at(rows, input_ids, attention_mask)
