"""A model, lenses and texts to trajectories and comparisons."""

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import DIVERGENCES
from tunedlens.model import FrozenModel
from tunedlens.tokenizer import token_text
from tunedlens.trajectories.comparison import Comparison
from tunedlens.trajectories.inputs import (
    Lenses,
    Text,
    Texts,
    Tokens,
    is_single,
    named_lenses,
    texts_of,
    token_ids,
    tracked_tokens,
)
from tunedlens.trajectories.predictions import LensPredictions, concatenate
from tunedlens.trajectories.reading import (
    Reader,
    divergences_by_name,
    ids_to_track,
    read_lens,
)
from tunedlens.trajectories.result import Trajectory, selected
from tunedlens.trajectories.windows import next_ids, pieces, rows_of, states_of


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
    """Read one text, or several, with one lens or several.

    Args:
        model: the model.
        lenses: one, several (by name if two are of one kind), or None for the logit lens.
        text: a text or its token ids; a list of them gives a list of trajectories, and the
            texts go through the model together.
        sites: names of `model.sites.SITES`; the model's own row is always the last. A lens
            with translators reads only the stream between blocks.
        k: the number of best tokens to keep at each row and position.
        track: tokens to follow at every position, as text or ids, in addition to those that
            are the best token of some row of some lens.
        stride: reads a text that is longer than the context in windows that start `stride`
            tokens apart. Each position is read in the first window that contains it, so it
            sees at least context - stride tokens before it.

    Raises:
        InputError: a text is empty, or longer than the context without a stride; a token to
            track is several tokens; there is no such site; a lens cannot read a site or was
            made for another model.
    """
    sites = [sites] if isinstance(sites, str) else list(sites)
    rows = rows_of(model.identity.n_layers, sites)
    reader = Reader(model, named_lenses(model, lenses, sites), rows)
    _require_k(model, k)
    wanted, names = tracked_tokens(model, track)
    texts = texts_of(model, text)
    parts: list[dict[str, list[LensPredictions]]] = [{n: [] for n in reader.lenses} for _ in texts]
    tracked: list[list[Tensor]] = [[] for _ in texts]
    for piece in pieces(model, texts, rows, stride):
        following = next_ids(texts[piece.text])[list(piece.positions)]
        for part in torch.arange(len(following)).split(reader.chunk_positions):
            logits = reader.logits([state[part] for state in piece.states])
            ids = ids_to_track(logits.values(), wanted)
            tracked[piece.text].append(ids)
            final = reader.model_distribution(logits)
            for name, lens_logits in logits.items():
                one = read_lens(name, lens_logits, final, following[part], ids, k)
                parts[piece.text][name].append(one)
    results = [
        _result(reader, ids, range(len(ids)), by_lens, following_ids, names)
        for ids, by_lens, following_ids in zip(texts, parts, tracked, strict=True)
    ]
    return results[0] if is_single(text) else results


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

    Whatever is not given for the baseline is that of the first side, except the lenses of
    another model, which are its logit lens. Both sides track the same tokens at aligned
    positions: the best ones of every row of both.

    Args:
        baseline_lenses: a lens is compared with the one of the same name, or with the first.
        baseline_model: a model with the same vocabulary and number of layers.
        positions: the positions of the text to compare.
        baseline_positions: those of the baseline text; by default the same.
        sites, k, track, stride: as for `trajectory`.

    Raises:
        InputError: nothing differs, the sides do not align, or as for `trajectory`.
    """
    if baseline_text is baseline_lenses is baseline_model is baseline_positions is None:
        raise InputError("give a baseline to compare with: a text, lenses, a model or positions")
    sites = [sites] if isinstance(sites, str) else list(sites)
    other = baseline_model or model
    if baseline_lenses is None and baseline_model is None:
        baseline_lenses = lenses
    _require_comparable(model, other)
    _require_k(model, k)
    rows = rows_of(model.identity.n_layers, sites)
    readers = [
        Reader(model, named_lenses(model, lenses, sites), rows),
        Reader(other, named_lenses(other, baseline_lenses, sites), rows),
    ]
    texts = [
        token_ids(model, text),
        token_ids(other, text if baseline_text is None else baseline_text),
    ]
    keys = [positions, positions if baseline_positions is None else baseline_positions]
    chosen = [selected(key, len(ids), "position") for key, ids in zip(keys, texts, strict=True)]
    if len(chosen[0]) != len(chosen[1]):
        raise InputError(
            f"compared texts must have the same number of positions; got {len(chosen[0])} and "
            f"{len(chosen[1])}; choose some with `positions` and `baseline_positions`"
        )
    wanted, names = tracked_tokens(model, track)
    return _compared(readers, texts, chosen, wanted, names, k, stride)


def _compared(
    readers: Sequence[Reader],
    texts: Sequence[Int[Tensor, " text"]],
    chosen: Sequence[range],
    wanted: Sequence[int],
    names: dict[str, int],
    k: int,
    stride: int | None,
) -> Comparison:
    """Read both sides a few aligned positions at a time."""
    sides = range(len(readers))
    states = [
        [state[list(at)] for state in states_of(reader.model, ids, reader.rows, stride)]
        for reader, ids, at in zip(readers, texts, chosen, strict=True)
    ]
    following = [next_ids(ids)[list(at)] for ids, at in zip(texts, chosen, strict=True)]
    parts: list[dict[str, list[LensPredictions]]] = [{n: [] for n in r.lenses} for r in readers]
    tracked: list[Tensor] = []
    first = readers[0].lenses
    pairs = {
        name: name if name in readers[1].lenses else next(iter(readers[1].lenses)) for name in first
    }
    divergences: dict[str, dict[str, list[Tensor]]] = {
        name: {metric: [] for metric in DIVERGENCES} for name in first
    }
    size = max(1, min(reader.chunk_positions for reader in readers) // 2)
    for part in torch.arange(len(following[0])).split(size):
        logits = [readers[i].logits([state[part] for state in states[i]]) for i in sides]
        ids = ids_to_track([one for by_lens in logits for one in by_lens.values()], wanted)
        tracked.append(ids)
        for name, baseline in pairs.items():
            between = divergences_by_name(logits[0][name], logits[1][baseline])
            for metric, values in between.items():
                divergences[name][metric].append(values)
        for i in sides:
            final = readers[i].model_distribution(logits[i])
            for name, lens_logits in logits[i].items():
                one = read_lens(name, lens_logits, final, following[i][part], ids, k)
                parts[i][name].append(one)
    ours, theirs = (
        _result(readers[i], texts[i], chosen[i], parts[i], tracked, names) for i in sides
    )
    joined = {
        name: {metric: concatenate(values) for metric, values in by_metric.items()}
        for name, by_metric in divergences.items()
    }
    return Comparison(ours, theirs, joined)


def _result(
    reader: Reader,
    ids: Int[Tensor, " text"],
    positions: range,
    parts: dict[str, list[LensPredictions]],
    tracked: list[Tensor],
    names: dict[str, int],
) -> Trajectory:
    """Join the chunks, and name every token that occurs in them."""
    tokenizer, at = reader.model.tokenizer, list(positions)
    predictions = {name: LensPredictions.concatenate(chunks) for name, chunks in parts.items()}
    tracked_ids = concatenate(tracked, -1)
    input_ids, following = ids[at], next_ids(ids)[at]
    occurring: Iterable[Tensor] = (
        *(input_ids, following, tracked_ids),
        *(one.top_ids for one in predictions.values()),
    )
    vocabulary = torch.cat([one.flatten() for one in occurring]).unique().tolist()
    return Trajectory(
        model=reader.model.name,
        text=str(tokenizer.decode(ids.tolist())),
        input_ids=input_ids,
        next_ids=following,
        positions=at,
        rows=list(reader.rows),
        n_layers=reader.model.identity.n_layers,
        predictions=predictions,
        tracked_ids=tracked_ids,
        track=names,
        vocabulary={i: token_text(tokenizer, i) for i in vocabulary if i >= 0},
    )


def _require_k(model: FrozenModel, k: int) -> None:
    if not 1 <= k <= model.identity.vocab_size:
        raise InputError(f"k must be between 1 and {model.identity.vocab_size}, got {k}")


def _require_comparable(model: FrozenModel, baseline: FrozenModel) -> None:
    size, other = model.identity.vocab_size, baseline.identity.vocab_size
    if size != other:
        raise InputError(
            f"compared models must have one vocabulary; got {size:,} and {other:,} tokens"
        )
    layers, other = model.identity.n_layers, baseline.identity.n_layers
    if layers != other:
        raise InputError(
            f"compared models must have the same number of layers; got {layers} and {other}"
        )
