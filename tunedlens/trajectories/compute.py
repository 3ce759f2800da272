"""Computes trajectories and comparisons from a model, lenses and texts."""

from collections.abc import Sequence
from typing import overload

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens.devices import float32_products
from tunedlens.errors import InputError
from tunedlens.metrics import DIVERGENCES
from tunedlens.model import FrozenModel
from tunedlens.trajectories.comparison import Comparison
from tunedlens.trajectories.inputs import Lenses, Text, Texts, texts_of, token_ids, tracked_tokens
from tunedlens.trajectories.reading import Chunk, Reader, divergences, ids_to_track
from tunedlens.trajectories.result import Tokens, Trajectory, selected
from tunedlens.trajectories.states import next_ids, pieces


@overload
def trajectory(
    model: FrozenModel,
    lenses: Lenses,
    text: Text,
    *,
    sites: str | Sequence[str] = ...,
    k: int = ...,
    track: Tokens = ...,
    stride: int | None = ...,
) -> Trajectory: ...
@overload
def trajectory(
    model: FrozenModel,
    lenses: Lenses,
    text: Texts,
    *,
    sites: str | Sequence[str] = ...,
    k: int = ...,
    track: Tokens = ...,
    stride: int | None = ...,
) -> list[Trajectory]: ...
@float32_products()
@torch.no_grad()
def trajectory(
    model: FrozenModel,
    lenses: Lenses,
    text: Text | Texts,
    *,
    sites: str | Sequence[str] = ("resid_pre",),
    k: int = 10,
    track: Tokens = (),
    stride: int | None = None,
) -> Trajectory | list[Trajectory]:
    """Compute the predictions of lenses at every layer and position of a text.

    Args:
        lenses: one lens, a list, a dict by name, or None for the logit lens. Lenses are objects,
            paths, or names on the hub. Two lenses of one kind need names.
        text: a text or its token ids. A list of texts gives a list of trajectories; the texts go
            through the model together.
        sites: names in `model.sites.SITES`. The model's own row is always the last. Rows at which
            a lens has no translator are left out.
        k: the number of most probable tokens to keep at each row and position.
        track: further tokens whose probabilities are kept at every position, as text or ids. The
            most probable tokens of each row and lens are always tracked.
        stride: read a text that is longer than the context in windows that start `stride` tokens
            apart. Each position is read in the first window that contains it, with at least
            context - stride tokens before it.

    Raises:
        InputError: a text is empty, or longer than the context without a stride; a token to
            track is several tokens; there is no such site; a lens cannot read a site or was
            made for another model.
    """
    reader = Reader(model, lenses, sites, k)
    wanted, names = tracked_tokens(model, track)
    texts, is_one = texts_of(model, text)
    chunks: list[list[Chunk]] = [[] for _ in texts]
    for piece in pieces(model, texts, reader.rows, stride):
        following = next_ids(texts[piece.text])[list(piece.positions)]
        for part in torch.arange(len(following)).split(reader.chunk_positions):
            logits = reader.logits([state[part] for state in piece.states])
            tracked_ids = ids_to_track([logits], wanted)
            chunks[piece.text].append(reader.chunk(logits, following[part], tracked_ids))
    results = [
        reader.trajectory(ids, range(len(ids)), parts, names)
        for ids, parts in zip(texts, chunks, strict=True)
    ]
    return results[0] if is_one else results


@float32_products()
@torch.no_grad()
def compare(
    model: FrozenModel,
    lenses: Lenses,
    text: Text,
    *,
    baseline_text: Text | None = None,
    baseline_lenses: Lenses = None,
    baseline_model: FrozenModel | None = None,
    positions: int | slice = slice(None),
    baseline_positions: int | slice | None = None,
    sites: str | Sequence[str] = ("resid_pre",),
    k: int = 10,
    track: Tokens = (),
    stride: int | None = None,
) -> Comparison:
    """Compare lenses on a text with a baseline: another text, other lenses or another model.

    Arguments that are not given for the baseline are those of the first side, except that the
    default lens of another model is its logit lens. At aligned positions, both sides track the
    same tokens: the most probable ones of every row of both sides.

    Args:
        model: the model of the first side.
        text: a text or its token ids.
        baseline_text: the text of the baseline.
        baseline_lenses: each lens is compared with the one of the same name, or with the first.
        baseline_model: a model with the same vocabulary and number of layers.
        positions: the positions of the text to compare.
        baseline_positions: the positions of the baseline text; by default the same.
        lenses, sites, k, track, stride: as for `trajectory`.

    Raises:
        InputError: nothing differs, the sides do not align, or as for `trajectory`.
    """
    if baseline_text is baseline_lenses is baseline_model is baseline_positions is None:
        raise InputError("there is no baseline; give a text, lenses, a model or positions for it")
    if baseline_lenses is None and baseline_model is None:
        baseline_lenses = lenses
    baseline_model = baseline_model or model
    _require_comparable(model, baseline_model)
    readers = [
        Reader(model, lenses, sites, k),
        Reader(baseline_model, baseline_lenses, sites, k),
    ]
    rows = [row for row in readers[0].rows if row in readers[1].rows]
    for reader in readers:
        reader.rows = rows
    texts = [
        token_ids(model, text),
        token_ids(baseline_model, text if baseline_text is None else baseline_text),
    ]
    keys = [positions, positions if baseline_positions is None else baseline_positions]
    chosen = [selected(key, len(ids), "position") for key, ids in zip(keys, texts, strict=True)]
    if len(chosen[0]) != len(chosen[1]):
        raise InputError(
            f"compared texts must have the same number of positions; got {len(chosen[0])} and "
            f"{len(chosen[1])}; choose some with `positions` and `baseline_positions`"
        )
    return _compared(readers, texts, chosen, tracked_tokens(model, track), stride)


def _compared(
    readers: Sequence[Reader],
    texts: Sequence[Int[Tensor, " text"]],
    chosen: Sequence[Sequence[int]],
    tracked: tuple[list[int], dict[str, int]],
    stride: int | None,
) -> Comparison:
    """Read both sides a few aligned positions at a time."""
    wanted, names = tracked
    sides = list(zip(readers, texts, chosen, strict=True))
    states = [_states_at(reader, ids, at, stride) for reader, ids, at in sides]
    following = [next_ids(ids)[at] for _, ids, at in sides]
    others = readers[1].lenses
    pairs = {name: name if name in others else next(iter(others)) for name in readers[0].lenses}
    between: dict[str, list[Tensor]] = {name: [] for name in pairs}
    chunks: list[list[Chunk]] = [[], []]
    size = max(1, min(reader.chunk_positions for reader in readers) // 2)
    for part in torch.arange(len(chosen[0])).split(size):
        logits = [readers[i].logits([state[part] for state in states[i]]) for i in (0, 1)]
        tracked_ids = ids_to_track(logits, wanted)
        for name, other in pairs.items():
            between[name].append(divergences(logits[0][name], logits[1][other]))
        for i in (0, 1):
            chunks[i].append(readers[i].chunk(logits[i], following[i][part], tracked_ids))
    ours, theirs = (
        reader.trajectory(ids, at, parts, names)
        for (reader, ids, at), parts in zip(sides, chunks, strict=True)
    )
    by_lens = {
        name: dict(zip(DIVERGENCES, torch.cat(parts, -1), strict=True))
        for name, parts in between.items()
    }
    return Comparison(ours, theirs, by_lens)


def _states_at(
    reader: Reader, ids: Int[Tensor, " text"], positions: Sequence[int], stride: int | None
) -> list[Tensor]:
    """The states of one text at some positions, by row."""
    found = [piece.states for piece in pieces(reader.model, [ids], reader.rows, stride)]
    return [torch.cat(parts)[positions] for parts in zip(*found, strict=True)]


def _require_comparable(model: FrozenModel, baseline: FrozenModel) -> None:
    ours, theirs = model.identity, baseline.identity
    for what, one, other in (
        ("vocabulary size", ours.vocab_size, theirs.vocab_size),
        ("number of layers", ours.n_layers, theirs.n_layers),
    ):
        if one != other:
            raise InputError(
                f"compared models must have the same {what}; got {one:,} and {other:,}"
            )
