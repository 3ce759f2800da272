"""One text through the layers as an interactive page: one file, no network."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources

from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import TRAJECTORY_METRICS
from tunedlens.report.plots import styles
from tunedlens.report.plots.colors import COLOR_MAPS, MISSING, ColorScale, color_table
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
    names = list(trajectories[0].predictions)
    for trajectory in trajectories[1:]:
        if list(trajectory.predictions) != names:
            raise InputError(
                "texts on one page must be read with the same lenses; got "
                f"{', '.join(names)} and {', '.join(trajectory.predictions)}"
            )
    pairs = {f"{a} − {b}": (a, b) for a, b in itertools.combinations(names, 2)}
    first = trajectories[0]
    everywhere = set.intersection(*map(set, first.tracked_ids.tolist())) - {-1}
    tracked: dict[str | int, str] = {i: first.vocabulary[i].shown for i in sorted(everywhere)}
    tokens = TOKENS | tracked
    views = [_views(trajectory, list(tokens), pairs) for trajectory in trajectories]
    data: Json = {
        "metrics": {name: asdict(metric) for name, metric in TRAJECTORY_METRICS.items()},
        "tokens": [[str(token), label] for token, label in tokens.items()],
        "colors": {name: color_table(name) for name in COLOR_MAPS},
        "missing": [MISSING, "black"],
        "lenses": _line_styles(names),
        "pairs": pairs,
        "scales": {key: _scale(key, trajectories, views) for key in views[0]},
        "texts": [_text(*both) for both in zip(trajectories, views, strict=True)],
    }
    # Escaping "<" keeps a text that contains </script> inside the JSON.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    template = resources.files(__package__).joinpath("explorer.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text.replace("<", "\\u003c"))


def _views(
    trajectory: Trajectory, tokens: Sequence[str | int], pairs: Mapping[str, tuple[str, str]]
) -> dict[str, Tensor]:
    """The values of every lens and pair of lenses, for every metric and token."""
    views = {}
    for metric, about in TRAJECTORY_METRICS.items():
        wanted = [one for one in tokens if (metric, one) != ("rank", "top1")]
        for token in wanted if about.has_token else ["top1"]:
            suffix = f"/{metric}" + (f"/{token}" if about.has_token else "")
            for lens in trajectory.predictions:
                views[lens + suffix] = _values(trajectory, metric, lens, token)
            for pair, (a, b) in pairs.items():
                views[pair + suffix] = views[a + suffix] - views[b + suffix]
    return views


def _values(trajectory: Trajectory, metric: str, lens: str, token: str | int) -> Tensor:
    """Values of one lens; NaN throughout if the text does not know the token."""
    if isinstance(token, int) and token not in trajectory.vocabulary:
        return trajectory.values("kl_nats", lens) * math.nan
    return trajectory.values(metric, lens, token=token)


def _scale(
    key: str, trajectories: Sequence[Trajectory], views: Sequence[dict[str, Tensor]]
) -> Json:
    """One scale of colours for all texts."""
    values = [(text, view[key]) for text, view in zip(trajectories, views, strict=True)]
    lens, metric, *_ = key.split("/")
    is_difference = lens not in trajectories[0].predictions
    return asdict(ColorScale.from_values(metric, values, is_difference=is_difference))


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
                "top_probs": _significant(one.top_log_probs.exp()),
                "top_logits": _rounded(one.top_logits),
                "tracked_probs": _significant(one.tracked_log_probs.exp()),
            }
            for name, one in trajectory.predictions.items()
        },
        "views": {key: _rounded(values) for key, values in views.items()},
    }


def _line_styles(lenses: list[str]) -> Json:
    """The colour and dash of every lens, as in the figures."""
    dashes = {"-": "none", "--": "5 3", "-.": "6 2 1 2", ":": "1 2"}
    found: Json = {}
    known = styles(lenses)
    for lens in lenses:
        style = known[lens]
        color = style["color"].replace("#000000", "currentColor")  # visible in the dark as well
        found[lens] = {"color": color, "dash": dashes.get(style["linestyle"], "none")}
    return found


def _rounded(values: Tensor) -> object:
    """Nested lists with four decimals; NaN becomes null."""
    return _each(values.tolist(), "{:.4f}")


def _significant(values: Tensor) -> object:
    """Nested lists with four significant digits; NaN becomes null."""
    return _each(values.tolist(), "{:.4g}")


def _each(value: object, digits: str) -> object:
    if isinstance(value, list):
        return [_each(one, digits) for one in value]
    assert isinstance(value, float)
    number = float(digits.format(value))
    if not math.isfinite(number):
        return None
    return int(number) if number == int(number) else number
