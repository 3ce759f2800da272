"""Texts in, trajectories out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.checkpoint import require_made_for
from tunedlens.errors import InputError
from tunedlens.frozen import FrozenModel
from tunedlens.lens import LogitLens, ResidualLens
from tunedlens.trajectory.reading import Reading, joined, read_states
from tunedlens.trajectory.result import Trajectory, single_id
from tunedlens.trajectory.states import decode, pieces, positions_at_a_time, rows_of

Text = str | Int[Tensor, " positions"]
Lenses = ResidualLens | Mapping[str, ResidualLens] | None


@overload
def trajectory(
    model: FrozenModel,
    lenses: Lenses,
    text: Text,
    *,
    sites: Sequence[str] = ...,
    k: int = ...,
    track: Sequence[str | int] | None = ...,
    stride: int | None = ...,
) -> Trajectory: ...
@overload
def trajectory(
    model: FrozenModel,
    lenses: Lenses,
    text: list[str] | list[Tensor],
    *,
    sites: Sequence[str] = ...,
    k: int = ...,
    track: Sequence[str | int] | None = ...,
    stride: int | None = ...,
) -> list[Trajectory]: ...
def trajectory(
    model: FrozenModel,
    lenses: Lenses,
    text: Text | list[str] | list[Tensor],
    *,
    sites: Sequence[str] = ("resid_pre",),
    k: int = 10,
    track: Sequence[str | int] | None = None,
    stride: int | None = None,
) -> Trajectory | list[Trajectory]:
    """Read one text, or several, with one lens or several.

    Args:
        model: the model.
        lenses: one, several by name, or None for the logit lens.
        text: text, or its token ids. Of a list of them, each has a trajectory of its own;
            they go through the model together.
        sites: where to look, of `frozen.SITES`; whatever they are, the model's own row is the
            last. A lens with translators only reads the stream between blocks.
        k: best tokens to keep at each row and position.
        track: tokens to follow at every position, as text or ids, beside the model's best; by
            default, at each position, those that are the best one in some row of some lens.
        stride: read a text that is longer than the context in windows that begin so many
            tokens apart; each position is read in the first window that has it, and so sees
            at least context - stride tokens before it.

    Raises:
        InputError: a text is empty, or beyond the context without a stride; a token to track
            is several; there is no such site, a lens cannot read one, or it is another model's.
    """
    named = _named(model, lenses)
    require_made_for(model, named)
    rows = rows_of(model.identity.n_layers, sites)
    if not 1 <= k <= model.identity.vocab_size:
        raise InputError(f"k must be between 1 and {model.identity.vocab_size}, got {k}")
    for name, lens in named.items():
        inside = [site for site in sites if site not in ("resid_pre", "resid_post")]
        if inside and not isinstance(lens, LogitLens):
            raise InputError(
                f"the lens {name} has translators for the stream between blocks only, not for "
                f"{', '.join(inside)}; read these with the logit lens alone"
            )
    wanted = None if track is None else [single_id(model, token) for token in track]
    given = [text] if isinstance(text, (str, Tensor)) else text
    texts = [_token_ids(model, one) for one in given]
    if not texts:
        raise InputError("there is no text to read; give at least one")

    parts: list[dict[str, list[Reading]]] = [{name: [] for name in named} for _ in texts]
    tracked: list[list[list[int]]] = [[] for _ in texts]
    for piece in pieces(model, texts, rows, stride):
        ids = texts[piece.text]
        end = ids.new_tensor([-1])
        next_ids = torch.cat([ids[1:], end])[piece.positions.start : piece.positions.stop]
        size = positions_at_a_time(model, len(rows) * len(named))
        for part in torch.arange(len(next_ids)).split(size):
            states = [state[part] for state in piece.states]
            final = model.unembedding(states[-1])
            logits = {name: decode(lens, rows, states) for name, lens in named.items()}
            followed = _followed(logits.values(), final, wanted)
            tracked[piece.text] += followed
            for name in named:
                parts[piece.text][name].append(
                    read_states(logits[name], final, next_ids[part], followed, k)
                )
    found = [
        Trajectory(
            model=model,
            lenses=named,
            text_ids=ids,
            stride=stride,
            rows=rows,
            positions=list(range(len(ids))),
            readings={name: joined(chunks) for name, chunks in readings.items()},
            tracked_ids=_filled(followed),
        )
        for ids, readings, followed in zip(texts, parts, tracked, strict=True)
    ]
    return found if isinstance(text, list) else found[0]


def _named(model: FrozenModel, lenses: Lenses) -> dict[str, ResidualLens]:
    if lenses is None:
        return {"logit": LogitLens.from_model(model)}
    if isinstance(lenses, ResidualLens):
        return {type(lenses).__name__.removesuffix("Lens").lower(): lenses}
    if not lenses:
        raise InputError("there is no lens to read with; give one, or None for the logit lens")
    for name, lens in lenses.items():
        if not isinstance(lens, ResidualLens):
            raise InputError(
                f"the lens {name} is a {type(lens).__name__}, which reads no state of a text; "
                "expected lenses that are the model at the last state"
            )
    return dict(lenses)


def _token_ids(model: FrozenModel, text: Text) -> Int[Tensor, " positions"]:
    """On the CPU, whatever their number.

    Raises:
        InputError: there are none, or some are no tokens of the model.
    """
    if isinstance(text, str):
        return model.encode(text, is_any_length=True)[0].cpu()
    if text.ndim != 1 or not len(text) or text.is_floating_point():
        raise InputError(
            f"the ids of a text must be whole numbers in one row, got {text.dtype} of shape "
            f"{tuple(text.shape)}"
        )
    vocab_size = model.identity.vocab_size
    if not 0 <= int(text.min()) <= int(text.max()) < vocab_size:
        raise InputError(
            f"token ids must be between 0 and {vocab_size - 1}, got {int(text.min())} to "
            f"{int(text.max())}"
        )
    return text.cpu()


def _followed(
    logits: Iterable[Float[Tensor, "rows chunk vocab"]],
    final: Float[Tensor, "chunk vocab"],
    wanted: list[int] | None,
) -> list[list[int]]:
    """Tokens to follow at each position: those wanted, or the best of every row; the model's."""
    best = final.argmax(-1).tolist()
    if wanted is None:
        others = torch.cat([found.argmax(-1) for found in logits]).T.tolist()
    else:
        others = [wanted] * len(best)
    return [sorted({own, *line}) for own, line in zip(best, others, strict=True)]


def _filled(lines: Sequence[Sequence[int]]) -> Int[Tensor, "positions tracked"]:
    """Lines of different length as one tensor, filled up with -1."""
    width = max(map(len, lines))
    return torch.tensor([[*line, *[-1] * (width - len(line))] for line in lines])
