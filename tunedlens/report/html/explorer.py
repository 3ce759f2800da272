"""One text through the layers as an interactive page: one file, no network."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import TRAJECTORY_METRICS
from tunedlens.report.plots.colors import COLOR_MAPS, MISSING, ColorScale, color_table
from tunedlens.report.plots.style import Style, styles
from tunedlens.trajectories import TOKENS, Comparison, Trajectory

Json = dict[str, object]
_ROW_PIXELS = 24
_AROUND_PIXELS = 640
"""The height of the page without its rows."""
_BYTES = re.compile("⟨((?:[0-9a-f]{2} ?)+)⟩")
"""A token that forms no whole character, as `tokenizer.shown` writes it."""


def explorer(*trajectories: Trajectory) -> str:
    """An interactive heatmap of one text, or of several texts one above the other.

    A reader can switch the lens (or the difference of two) and the metric, point at a cell to see
    its best tokens, and click it to follow its token through the layers. With two texts, the page
    also shows their difference at each position. All lenses share one colour scale. Every number,
    limit, label and colour is computed here; the page only draws.

    Raises:
        InputError: the texts were read with different lenses.
    """
    first = trajectories[0]
    names = list(first.predictions)
    for trajectory in trajectories[1:]:
        if list(trajectory.predictions) != names:
            raise InputError(
                "texts on one page must be read with the same lenses; got "
                f"{', '.join(names)} and {', '.join(trajectory.predictions)}"
            )
    pairs = {f"{a} − {b}": (a, b) for a, b in itertools.combinations(names, 2)}
    everywhere = set.intersection(*map(set, first.tracked_ids.tolist())) - {-1}
    tokens = TOKENS | {i: first.vocabulary[i].shown for i in sorted(everywhere)}
    views = [_views(trajectory, names, list(tokens), pairs) for trajectory in trajectories]
    scales = _scales(trajectories, views, list(pairs))
    texts = [_text(*both) for both in zip(trajectories, views, strict=True)]
    if len(trajectories) == 2 and trajectories[0].rows == trajectories[1].rows:
        ours, theirs = (text[:, : min(map(_length, trajectories))] for text in trajectories)
        change = _views(Comparison(ours, theirs, {}), names, list(tokens), pairs)
        for key, scale in _scales([ours], [change], [*names, *pairs]).items():
            scales[f"change/{key}"] = scale
        texts.append(_text(ours, change) | {"is_change": True})
    line_styles = styles(names, {})
    data: Json = {
        "metrics": {name: asdict(metric) for name, metric in TRAJECTORY_METRICS.items()},
        "tokens": [[str(token), label] for token, label in tokens.items()],
        "colors": {name: color_table(name) for name in COLOR_MAPS},
        "missing": [MISSING, "black"],
        "lenses": {lens: _line_style(line_styles[lens]) for lens in names},
        "pairs": pairs,
        "scales": scales,
        "texts": texts,
    }
    # Escaping "<" keeps a text that contains </script> inside the JSON.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    template = resources.files(__package__).joinpath("explorer.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text.replace("<", "\\u003c"))


def explorer_height(trajectory: Trajectory) -> int:
    """The height in pixels of a frame in which the page of one text has room."""
    return _AROUND_PIXELS + _ROW_PIXELS * len(trajectory.rows)


def _length(trajectory: Trajectory) -> int:
    return len(trajectory.positions)


def _scales(
    trajectories: Sequence[Trajectory],
    views: Sequence[Mapping[str, Tensor]],
    pairs: Sequence[str],
) -> dict[str, Json]:
    """The scales of all views, which lenses share, and so do pairs of lenses.

    Args:
        pairs: the names before the slash of views that are differences.
    """
    groups: dict[tuple[bool, str], list[tuple[Trajectory, Tensor]]] = {}
    for text, view in zip(trajectories, views, strict=True):
        for key, values in view.items():
            lens, _, what = key.partition("/")
            groups.setdefault((lens in pairs, what), []).append((text, values))
    scales = {
        (is_pair, what): asdict(
            ColorScale.from_values(what.split("/")[0], group, is_difference=is_pair)
        )
        for (is_pair, what), group in groups.items()
    }
    return {
        key: scales[lens in pairs, what]
        for key in views[0]
        for lens, _, what in [key.partition("/")]
    }


def _views(
    data: Trajectory | Comparison,
    lenses: Sequence[str],
    tokens: Sequence[str | int],
    pairs: Mapping[str, tuple[str, str]],
) -> dict[str, Tensor]:
    """The values of every lens and pair of lenses, for every metric and token.

    They are NaN throughout if the text does not know the token.
    """
    views = {}
    for metric, about in TRAJECTORY_METRICS.items():
        for token in tokens if about.has_token else ["top1"]:
            if (metric, token) == ("rank", "top1"):  # it is 1 everywhere
                continue
            suffix = f"/{metric}/{token}" if about.has_token else f"/{metric}"
            for lens in lenses:
                try:
                    views[lens + suffix] = data.values(metric, lens, token=token)
                except InputError:
                    views[lens + suffix] = data.values("kl_nats", lens) * math.nan
            for pair, (a, b) in pairs.items():
                views[pair + suffix] = views[a + suffix] - views[b + suffix]
    return views


def _pieces(trajectory: Trajectory) -> list[Json]:
    """The text in pieces of whole characters, each with the index of its last token."""
    pieces: list[Json] = []
    pending, names = b"", ""
    for index, token in enumerate(trajectory.input_ids.tolist()):
        text, shown = trajectory.vocabulary[token]
        if text == shown and (found := _BYTES.fullmatch(shown)):
            pending, names = pending + bytes.fromhex(found[1]), names + shown
            try:
                text = pending.decode()
            except UnicodeDecodeError:
                continue  # the next token has the rest of the character
        else:
            text = names + text  # bytes that no token completes
        pieces.append({"text": text, "at": index})
        pending, names = b"", ""
    if names:
        pieces.append({"text": names, "at": len(trajectory.positions) - 1})
    return pieces


def _text(trajectory: Trajectory, views: dict[str, Tensor]) -> Json:
    shown = {i: token.shown for i, token in trajectory.vocabulary.items()}
    next_ids = trajectory.next_ids.tolist()
    return {
        "model": trajectory.model,
        "tokens": [shown[i] for i in trajectory.input_ids.tolist()],
        "pieces": _pieces(trajectory),
        "positions": trajectory.positions,
        "next": [shown.get(i) for i in next_ids],
        "next_ids": next_ids,
        "final_ids": trajectory.final_ids.tolist(),
        "rows": trajectory.row_names,
        "words": shown,
        "has_embeddings": trajectory.rows[0] == ("resid_pre", 0),
        "tracked_ids": trajectory.tracked_ids.tolist(),
        "lenses": {
            name: {
                "top_ids": one.top_ids.tolist(),
                "top_probs": _numbers(one.top_log_probs.exp().tolist(), ".4g"),
                "top_logits": _numbers(one.top_logits.tolist(), ".4f"),
                "tracked_probs": _numbers(one.tracked_log_probs.exp().tolist(), ".4g"),
            }
            for name, one in trajectory.predictions.items()
        },
        "views": {key: _numbers(values.tolist(), ".4f") for key, values in views.items()},
    }


def _line_style(style: Style) -> Json:
    """The colour and dash of a lens, as in the figures."""
    dashes = {"-": "none", "--": "5 3", "-.": "6 2 1 2", ":": "1 2"}
    color = style["color"].replace("#000000", "currentColor")  # visible in the dark as well
    return {"color": color, "dash": dashes.get(style["linestyle"], "none")}


def _numbers(value: Any, digits: str) -> object:
    """Nested lists of numbers with few digits; NaN becomes null."""
    if isinstance(value, list):
        return [_numbers(one, digits) for one in value]
    number = float(format(value, digits))
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else number
