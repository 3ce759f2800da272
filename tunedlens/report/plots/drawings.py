"""The plots of a report."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from tunedlens.evaluation import Evaluation
from tunedlens.report.plots.by_layer import by_layer
from tunedlens.report.plots.grids import by_position, transfer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drawing(NamedTuple):
    """A plot of an evaluation."""

    caption: str
    draw: Callable[[Evaluation], "Figure"]
    has_data: Callable[[Evaluation], bool]
    metrics: Sequence[str] = ()
    """Those of its panels, if they are drawn by layer."""


def _of_metrics(
    caption: str,
    *metrics: str,
    rows: int = 1,
    size: tuple[float, float] = (5.0, 3.2),
    limits: tuple[float, float] | None = None,
) -> Drawing:
    """A drawing by `by_layer`, of an evaluation that has all the metrics."""
    draw = partial(by_layer, metrics=metrics, rows=rows, size=size, limits=limits)
    return Drawing(caption, draw, lambda evaluation: {*metrics} <= {*evaluation.metrics}, metrics)


_BAND = "Bands show two standard errors on either side."
DRAWINGS = {
    "overview": _of_metrics(
        "KL, perplexity, top-1 agreement and prediction depth of every lens. Lower is better in "
        "(a) and (b), higher in (c). At the last depth, only the model itself predicts the token. "
        "An arrow marks a value above the scale. Bands and error bars show two standard errors on "
        "either side.",
        *("kl_nats", "perplexity", "top1_agreement", "prediction_depth"),
        rows=2,
        size=(9.2, 6.2),
    ),
    "kl_by_layer": _of_metrics(
        f"KL from the model's final distribution to that of each lens (lower is closer). {_BAND}",
        "kl_nats",
    ),
    "perplexity_by_layer": _of_metrics(
        f"Perplexity of the next token (lower is better); the grey line is the model. {_BAND}",
        "perplexity",
    ),
    "bits_per_byte_by_layer": _of_metrics(
        f"Cross-entropy in bits per byte (lower is better); the grey line is the model. {_BAND}",
        "bits_per_byte",
    ),
    "bias_by_layer": _of_metrics(
        "Bias: KL from the model's mean distribution over the text to the lens's (lower is "
        f"closer). {_BAND}",
        "bias_nats",
    ),
    "agreement_by_layer": _of_metrics(
        "Fraction of tokens where the model's most probable token is the lens's most probable "
        f"one (a) or among its top ten (b); higher is closer to the model. {_BAND}",
        *("top1_agreement", "top10_agreement"),
        size=(8.6, 3.2),
        limits=(0, 1.02),
    ),
    "prediction_depth": _of_metrics(
        "Fraction of tokens by the first layer from which the most probable token no longer "
        "changes. Error bars show two standard errors on either side.",
        "prediction_depth",
    ),
    "transfer": Drawing(
        "KL when the translator of one layer is applied at another (lower is closer).",
        transfer,
        lambda evaluation: bool(evaluation.transfer),
    ),
    "by_position": Drawing(
        f"KL by position in the block; the first position has a separate marker. {_BAND}",
        by_position,
        lambda evaluation: bool(evaluation.by_position),
    ),
}
"""The plots of a report by the name of their files."""
