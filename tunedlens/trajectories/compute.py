"""Texts in, trajectories out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.lenses import LogitLens, ResidualLens, require_made_for
from tunedlens.model import FrozenModel
from tunedlens.trajectories.predictions import LensPredictions, cat_filled, joined, read_states
from tunedlens.trajectories.result import Trajectory, single_ids
from tunedlens.trajectories.windows import decode, next_ids, pieces, positions_at_a_time, rows_of

Text = str | list[int] | Int[Tensor, " positions"]
Texts = list[str] | list[list[int]] | list[Tensor] | tuple[Text, ...]
Lenses = ResidualLens | Sequence[ResidualLens] | Mapping[str, ResidualLens] | None


@overload
def trajectory(
    model: FrozenModel,
    lenses: Lenses,
    text: Text,
    *,
    sites: str | Sequence[str] = ...,
    k: int = ...,
    track: str | int | Sequence[str | int] = ...,
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
    track: str | int | Sequence[str | int] = ...,
    stride: int | None = ...,
) -> list[Trajectory]: ...
def trajectory(
    model: FrozenModel,
    lenses: Lenses,
    text: Text | Texts,
    *,
    sites: str | Sequence[str] = ("resid_pre",),
    k: int = 10,
    track: str | int | Sequence[str | int] = (),
    stride: int | None = None,
) -> Trajectory | list[Trajectory]:
    """Read one text, or several, with one lens or several.

    Args:
        model: the model.
        lenses: one, several (by name if two are of one kind), or None for the logit lens.
        text: text, or its token ids. Of a list of them, each has a trajectory of its own;
            they go through the model together.
        sites: where to look, of `sites.SITES`; whatever they are, the model's own row is the
            last. A lens with translators only reads the stream between blocks.
        k: best tokens to keep at each row and position.
        track: tokens to follow at every position, as text or ids, beside those that are the
            best one there in some row of some lens.
        stride: read a text that is longer than the context in windows that begin so many
            tokens apart; each position is read in the first window that has it, and so sees
            at least context - stride tokens before it.

    Raises:
        InputError: a text is empty, or beyond the context without a stride; a token to track
            is several; there is no such site, a lens cannot read one, or it is another model's.
    """
    named = _named(model, lenses)
    require_made_for(model, named)
    sites = [sites] if isinstance(sites, str) else sites
    rows = rows_of(model.identity.n_layers, sites)
    if not 1 <= k <= model.identity.vocab_size:
        raise InputError(f"k must be between 1 and {model.identity.vocab_size}, got {k}")
    _require_readable(sites, named)
    wanted = single_ids(model, track)
    texts, is_one = _texts(model, text)

    parts: list[dict[str, list[LensPredictions]]] = [{name: [] for name in named} for _ in texts]
    tracked: list[list[Int[Tensor, "chunk tracked"]]] = [[] for _ in texts]
    size = positions_at_a_time(model, len(rows) * len(named))
    for piece in pieces(model, texts, rows, stride):
        following = next_ids(texts[piece.text])[list(piece.positions)]
        for part in torch.arange(len(following)).split(size):
            states = [state[part] for state in piece.states]
            final = model.unembedding(states[-1])
            logits = {name: decode(lens, rows, states) for name, lens in named.items()}
            tracked_ids = _tracked_ids(logits.values(), wanted)
            tracked[piece.text].append(tracked_ids)
            for name in named:
                reading = read_states(logits[name], final, following[part], tracked_ids, k)
                if not reading.kl_nats.isfinite().all():
                    raise InputError(
                        f"the lens {name} says something that is not finite of the text; its "
                        "translators or the states of the model are not finite"
                    )
                parts[piece.text][name].append(reading)
    found = [
        Trajectory(
            model=model,
            lenses=named,
            text_ids=ids,
            stride=stride,
            rows=rows,
            positions=list(range(len(ids))),
            readings={name: joined(chunks) for name, chunks in readings.items()},
            tracked_ids=cat_filled(followed, -1),
        )
        for ids, readings, followed in zip(texts, parts, tracked, strict=True)
    ]
    return found[0] if is_one else found


def _named(model: FrozenModel, lenses: Lenses) -> dict[str, ResidualLens]:
    if lenses is None:
        return {"logit": LogitLens.from_model(model)}
    if isinstance(lenses, ResidualLens):
        return {_by_type(lenses): lenses}
    if not lenses:
        raise InputError("there is no lens to read with; give one, or None for the logit lens")
    if isinstance(lenses, Mapping):
        pairs = list(lenses.items())
    else:
        pairs = [(_by_type(lens), lens) for lens in lenses]
    for name, lens in pairs:
        if not isinstance(lens, ResidualLens):
            raise InputError(
                f"the lens {name} is a {type(lens).__name__}, which reads no state of a text; "
                "expected lenses that are the model at the last state"
            )
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise InputError(
            f"there are several lenses of one kind ({', '.join(names)}); give a dict that names "
            "them"
        )
    return dict(pairs)


def _require_readable(sites: Sequence[str], lenses: Mapping[str, ResidualLens]) -> None:
    """Make sure that every lens can read every site.

    Raises:
        InputError: one cannot.
    """
    inside = [site for site in sites if site not in ("resid_pre", "resid_post")]
    for name, lens in lenses.items():
        if inside and not isinstance(lens, LogitLens):
            raise InputError(
                f"the lens {name} has translators for the stream between blocks only, not for "
                f"{', '.join(inside)}; read these with the logit lens alone"
            )


def _texts(model: FrozenModel, text: Text | Texts) -> tuple[list[Int[Tensor, " positions"]], bool]:
    """The ids of every text, and whether it is one text rather than a list.

    Raises:
        InputError: it is neither, or one of them cannot be read.
    """
    if not isinstance(text, (str, Tensor, list, tuple)):
        raise InputError(
            f"expected a text, its token ids, or a list of texts; got {type(text).__name__}"
        )
    is_one = isinstance(text, (str, Tensor)) or (len(text) > 0 and isinstance(text[0], int))
    given: Any = [text] if is_one else text
    if not len(given):
        raise InputError("there is no text to read; give at least one")
    return [_token_ids(model, one) for one in given], is_one


def _by_type(lens: ResidualLens) -> str:
    return type(lens).__name__.removesuffix("Lens").lower()


def _token_ids(model: FrozenModel, text: Text) -> Int[Tensor, " positions"]:
    """On the CPU, whatever their number.

    Raises:
        InputError: there are none, or some are no tokens of the model.
    """
    if isinstance(text, str):
        return model.encode(text, is_any_length=True)[0].cpu()
    text = torch.as_tensor(text)
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


def _tracked_ids(
    logits: Iterable[Float[Tensor, "rows chunk vocab"]], wanted: list[int]
) -> Int[Tensor, "chunk tracked"]:
    """Tokens to follow at each position, those wanted and the best of every row."""
    best = torch.cat([found.argmax(-1) for found in logits]).cpu()
    lines = [torch.tensor(sorted({*wanted, *column})) for column in best.T.tolist()]
    return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-1)
