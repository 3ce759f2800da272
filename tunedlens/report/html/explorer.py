"""One text through the layers as an interactive page: one file, no network."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import TRAJECTORY_METRICS
from tunedlens.report.plots.colors import COLOR_MAPS, MISSING, ColorScale, color_table
from tunedlens.report.plots.style import Style, styles
from tunedlens.trajectories import TOKENS, Trajectory

Json = dict[str, object]


def explorer(*trajectories: Trajectory) -> str:
    """An interactive heatmap of one text, or of several texts beside each other.

    Switch the lens (or the difference of two) and the metric, point at a cell for its best
    tokens, click it to follow its token through the layers. The page draws; every number,
    limit, label and colour in it is computed here.

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
    views = [_views(trajectory, list(tokens), pairs) for trajectory in trajectories]
    scales = {}
    for key in views[0]:
        lens, metric, *_ = key.split("/")
        values = [(text, view[key]) for text, view in zip(trajectories, views, strict=True)]
        scales[key] = asdict(ColorScale.from_values(metric, values, is_difference=lens in pairs))
    line_styles = styles(names, {})
    data: Json = {
        "metrics": {name: asdict(metric) for name, metric in TRAJECTORY_METRICS.items()},
        "tokens": [[str(token), label] for token, label in tokens.items()],
        "colors": {name: color_table(name) for name in COLOR_MAPS},
        "missing": [MISSING, "black"],
        "lenses": {lens: _line_style(line_styles[lens]) for lens in names},
        "pairs": pairs,
        "scales": scales,
        "texts": [_text(*both) for both in zip(trajectories, views, strict=True)],
    }
    # Escaping "<" keeps a text that contains </script> inside the JSON.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    template = resources.files(__package__).joinpath("explorer.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text.replace("<", "\\u003c"))


def _views(
    trajectory: Trajectory, tokens: Sequence[str | int], pairs: Mapping[str, tuple[str, str]]
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
            for lens, one in trajectory.predictions.items():
                is_unknown = isinstance(token, int) and token not in trajectory.vocabulary
                views[lens + suffix] = (
                    one.kl_nats * math.nan
                    if is_unknown
                    else trajectory.values(metric, lens, token=token)
                )
            for pair, (a, b) in pairs.items():
                views[pair + suffix] = views[a + suffix] - views[b + suffix]
    return views


def _text(trajectory: Trajectory, views: dict[str, Tensor]) -> Json:
    shown = {i: token.shown for i, token in trajectory.vocabulary.items()}
    next_ids = trajectory.next_ids.tolist()
    return {
        "model": trajectory.model,
        "tokens": [shown[i] for i in trajectory.input_ids.tolist()],
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
