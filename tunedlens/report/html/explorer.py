"""One text through the layers as a page to explore: one file, no network."""

import json
import math
from importlib import resources
from typing import Any

from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.report.plots import styles
from tunedlens.trajectories import LensPredictions, Trajectory


def explorer(*trajectories: Trajectory) -> str:
    """The page of one text, or of several beside each other, with everything in it.

    A heatmap of the best token of every layer and position: switch lens (or the difference
    of two) and figure, point at a cell for its best tokens, click it to follow its token
    through the layers.

    Raises:
        InputError: texts were read with other lenses.
    """
    names = list(trajectories[0].readings)
    for trajectory in trajectories[1:]:
        if list(trajectory.readings) != names:
            raise InputError(
                "texts on one page must be read with the same lenses; got "
                f"{', '.join(names)} and {', '.join(trajectory.readings)}"
            )
    data = [_text(trajectory) for trajectory in trajectories]
    # A text that spells out the end of a script stays text.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    template = resources.files(__package__).joinpath("explorer.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text.replace("<", "\\u003c"))


def _text(trajectory: Trajectory) -> dict[str, Any]:
    readings = trajectory.readings
    words = {i for reading in readings.values() for i in reading.top_ids.flatten().tolist()}
    tracked_ids = trajectory.tracked_ids.tolist()
    words |= {i for line in tracked_ids for i in line if i >= 0}
    next_ids = trajectory.next_ids.tolist()
    looks = styles(list(readings))
    return {
        "model": trajectory.model.name,
        "tokens": [trajectory.shown(i) for i in trajectory.input_ids.tolist()],
        "positions": trajectory.positions,
        "next": [None if i < 0 else trajectory.shown(i) for i in next_ids],
        "next_ids": next_ids,
        "rows": trajectory.row_names,
        "words": {i: trajectory.shown(i) for i in sorted(words)},
        "has_embeddings": trajectory.rows[0] == ("resid_pre", 0),
        "tracked_ids": tracked_ids,
        "tracked_everywhere": sorted(set.intersection(*map(set, tracked_ids)) - {-1}),
        "lenses": {
            name: _figures(reading) | _look(name, looks) for name, reading in readings.items()
        },
    }


def _look(lens: str, looks: dict[str, dict[str, Any]]) -> dict[str, str]:
    """A lens has the colour and dash that it has in the figures."""
    dashes = {"-": "none", "--": "5 3", "-.": "6 2 1 2", ":": "1 2"}
    look = looks[lens]
    color = look["color"].replace("#000000", "currentColor")  # black is unseen in the dark
    return {"color": color, "dash": dashes.get(look["linestyle"], "none")}


def _figures(reading: LensPredictions) -> dict[str, Any]:
    return {
        "top_ids": reading.top_ids.tolist(),
        "top_log_probs": _rounded(reading.top_log_probs),
        "log_total": _rounded(reading.log_total),
        "entropy_nats": _rounded(reading.entropy_nats),
        "kl_nats": _rounded(reading.kl_nats),
        "cross_entropy_nats": _rounded(-reading.next_log_prob),
        "next_rank": reading.next_rank.tolist(),
        "tracked_log_probs": _rounded(reading.tracked_log_probs),
        "tracked_ranks": reading.tracked_ranks.tolist(),
    }


def _rounded(values: Tensor) -> Any:
    """Nested lists with four decimals; what is no number is null."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(one) for one in value]
        return round(value, 4) if math.isfinite(value) else None

    return number(values.tolist())
