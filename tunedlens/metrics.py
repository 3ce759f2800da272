"""The catalogue of metrics: the names, the meaning and the kind of each one.

`docs/architecture.md` explains how to add a metric.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from tunedlens.config import MetricSet


class Metric(NamedTuple):
    """How a metric is shown, and when it exists."""

    title: str
    """With the unit, if there is one."""
    meaning: str
    """A line in the glossary of a report."""
    is_log: bool = False
    """Whether plots use a log scale."""
    heading: str | None = None
    """The heading of a panel in a figure; by default the title without its unit."""
    column: str | None = None
    """The heading of a column in a table; by default the title."""
    for_model: bool = False
    """Whether the model by itself has a value, without a lens to compare."""
    where_lens_is_model: float | None = None
    """The value of a lens that agrees with the model everywhere, if it is known."""
    per_token: MetricSet | None = None
    """The smallest set that includes it, if it is measured at every token; None if it is computed
    from other metrics or from sums over a corpus."""


METRICS = {
    "kl_nats": Metric(
        "KL(model ‖ lens), nats",
        "divergence of the lens's distribution from the model's; 0 if both are equal, and lower is "
        "closer to the model",
        heading="KL to the model's output",
        column="KL, nats",
        is_log=True,
        where_lens_is_model=0,
        per_token="standard",
    ),
    "cross_entropy_nats": Metric(
        "cross-entropy, nats",
        "negative log-probability of the true next token; lower is better",
        column="CE, nats",
        for_model=True,
        per_token="standard",
    ),
    "perplexity": Metric(
        "perplexity",
        "exp of the mean cross-entropy; lower is better",
        heading="perplexity of the true next token",
        is_log=True,
        for_model=True,
    ),
    "bits_per_byte": Metric(
        "bits per byte",
        "total cross-entropy in bits, divided by the bytes of the predicted text; lower is better",
        column="bits/byte",
        is_log=True,
        for_model=True,
    ),
    "entropy_nats": Metric(
        "entropy, nats",
        "entropy of the lens's distribution; 0 if one token has all probability",
        for_model=True,
        per_token="standard",
    ),
    "top1_agreement": Metric(
        "top-1 agreement",
        "fraction of tokens where lens and model have the same most probable token; higher is "
        "closer to the model",
        column="top-1",
        heading="same best token as the model",
        where_lens_is_model=1,
        per_token="standard",
    ),
    "top10_agreement": Metric(
        "top-10 agreement",
        "fraction of tokens where the model's most probable token is among the lens's top ten; "
        "higher is closer to the model",
        column="top-10",
        heading="model's best token in the top ten",
        where_lens_is_model=1,
        per_token="standard",
    ),
    "accuracy": Metric(
        "accuracy",
        "fraction of tokens where the true next token is the lens's most probable one; higher is "
        "better",
        for_model=True,
        per_token="standard",
    ),
    "bias_nats": Metric(
        "bias, nats",
        "KL from the model's mean distribution over the text to the lens's; it is high if the lens "
        "predicts some tokens too often on average, and lower is closer to the model",
        is_log=True,
        where_lens_is_model=0,
    ),
    "kl_nats_position_0": Metric(
        "KL at position 0, nats",
        "KL(model ‖ lens) at the first position of each block, where the states of many models "
        "differ strongly from those at other positions; the KL over all positions includes it",
        is_log=True,
        where_lens_is_model=0,
    ),
    "reverse_kl_nats": Metric(
        "KL(lens ‖ model), nats",
        "KL in the other direction",
        is_log=True,
        where_lens_is_model=0,
        per_token="all",
    ),
    "js_nats": Metric(
        "Jensen–Shannon, nats",
        "Jensen–Shannon divergence from the model, at most ln 2",
        where_lens_is_model=0,
        per_token="all",
    ),
    "reciprocal_rank": Metric(
        "reciprocal rank",
        "mean of 1 / rank of the true next token",
        for_model=True,
        per_token="all",
    ),
    "model_top1_rank": Metric(
        "rank of the model's top token",
        "mean rank, from 1, of the model's most probable token",
        is_log=True,
        where_lens_is_model=1,
        per_token="all",
    ),
    "confidence": Metric(
        "confidence",
        "mean probability of the lens's most probable token",
        for_model=True,
        per_token="all",
    ),
    "calibration_error": Metric(
        "calibration error",
        "mean gap between confidence and accuracy, in 15 bins of confidence",
        for_model=True,
    ),
    "prediction_depth": Metric(
        "fraction of tokens",
        "fraction of tokens whose prediction depth is this layer: the first layer from which the "
        "most probable token no longer changes",
        heading="prediction depth",
    ),
    "mean_prediction_depth": Metric(
        "mean prediction depth, layers",
        "mean over tokens of the first layer from which the most probable token no longer changes",
    ),
}


def per_token_metrics(metric_set: MetricSet) -> tuple[str, ...]:
    """Names of the metrics that are measured at every token, in the catalogue's order."""
    sets = ("standard", metric_set)
    return tuple(name for name, metric in METRICS.items() if metric.per_token in sets)


@dataclass(frozen=True)
class TrajectoryMetric:
    """A metric of one text at every row and position, and how it is coloured."""

    label: str
    scale: Literal["linear", "sqrt", "log"] = "linear"
    low: float | None = None
    """The lower limit of the colours; by default the smallest value."""
    high: float | None = None
    is_low_better: bool = False
    """Whether small values have the bright colours."""
    has_token: bool = False
    """Whether it is a metric of one token rather than of the whole distribution."""


TRAJECTORY_METRICS = {
    "probability": TrajectoryMetric("probability", low=0, high=1, has_token=True),
    "log_prob": TrajectoryMetric("log probability, nats", has_token=True),
    "logit": TrajectoryMetric("logit", has_token=True),
    "rank": TrajectoryMetric("rank", "log", low=1, is_low_better=True, has_token=True),
    # A square root separates the small values beside the large ones of layer 0.
    "kl_nats": TrajectoryMetric("KL(model ‖ lens), nats", "sqrt", low=0, is_low_better=True),
    "entropy_nats": TrajectoryMetric("entropy, nats"),
    "cross_entropy_nats": TrajectoryMetric(
        "cross-entropy of the true next token, nats", is_low_better=True
    ),
}
"""The metrics of a lens at one row and position of a text."""

DIVERGENCES = {
    "kl_to_baseline_nats": TrajectoryMetric("KL(this ‖ baseline), nats", low=0),
    "js_nats": TrajectoryMetric("Jensen–Shannon divergence, nats", low=0),
    "total_variation": TrajectoryMetric("total variation", low=0),
}
"""The divergences between two lenses, texts or models at the same row and position."""

_SHORT_NAMES = {
    "prob": "probability",
    "logprob": "log_prob",
    "kl_to_baseline": "kl_to_baseline_nats",
}
_SHORT_NAMES |= {"kl": "kl_nats", "entropy": "entropy_nats", "js": "js_nats"}
_SHORT_NAMES |= {"cross_entropy": "cross_entropy_nats", "tv": "total_variation"}


def full_name(metric: str) -> str:
    """The name in the catalogue of a metric of one text, as `kl_nats` for `kl`."""
    return _SHORT_NAMES.get(metric, metric) if isinstance(metric, str) else metric
