"""One text through the layers as a page to explore: one file, no network."""

import json
import math
from importlib import resources
from typing import Any

from torch import Tensor

from tunedlens.tokens import shown
from tunedlens.trajectory import Reading, Trajectory


def explorer(trajectory: Trajectory) -> str:
    """The page of one text, with everything in it.

    A heatmap of the best token of every layer and position: switch lens (or the difference
    of two) and figure, point at a cell for its best tokens, click it to follow its token
    through the layers.
    """
    tokenizer = trajectory.model.tokenizer
    ids = trajectory.input_ids.tolist()
    readings = trajectory.readings
    words = {i for reading in readings.values() for i in reading.top_ids.flatten().tolist()}
    words |= {i for i in trajectory.tracked_ids.flatten().tolist() if i >= 0}
    data = {
        "tokens": [shown(tokenizer, i) for i in ids],
        "ids": ids,
        "rows": trajectory.row_names,
        "words": {i: shown(tokenizer, i) for i in sorted(words)},
        "tracked_ids": trajectory.tracked_ids.tolist(),
        "lenses": {name: _figures(reading) for name, reading in readings.items()},
    }
    # A text that spells out the end of a script stays text.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    template = resources.files(__package__).joinpath("explorer.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text.replace("<", "\\u003c"))


def _figures(reading: Reading) -> dict[str, Any]:
    return {
        "top_ids": reading.top_ids.tolist(),
        "top_log_probs": _rounded(reading.top_log_probs),
        "log_total": _rounded(reading.log_total),
        "entropy_nats": _rounded(reading.entropy_nats),
        "kl_nats": _rounded(reading.kl_nats),
        "cross_entropy_nats": _rounded(-reading.next_log_prob),
        "next_rank": reading.next_rank.tolist(),
        "tracked_log_probs": _rounded(reading.tracked_log_probs),
    }


def _rounded(values: Tensor) -> Any:
    """Nested lists with four decimals; what is no number is null."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(one) for one in value]
        return round(value, 4) if math.isfinite(value) else None

    return number(values.tolist())
