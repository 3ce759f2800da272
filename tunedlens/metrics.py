"""Every figure that an evaluation reports: its name, what it is called, its unit."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """How a figure is shown, and what it says."""

    label: str
    unit: str
    meaning: str
    is_log: bool = False
    """Whether it is drawn on a log scale."""
    of_model: bool = False
    """Whether the model has one by itself."""
    where_lens_is_model: float | None = None
    """What it is where the lens says what the model says."""

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


METRICS = {
    "kl_nats": Metric(
        "KL(model ‖ lens)",
        "nats",
        "how far the lens is from what the model says in the end",
        is_log=True,
        where_lens_is_model=0,
    ),
    "cross_entropy_nats": Metric(
        "cross-entropy", "nats", "minus log probability of the true next token", of_model=True
    ),
    "perplexity": Metric(
        "perplexity", "", "exp of the mean cross-entropy", is_log=True, of_model=True
    ),
    "bits_per_byte": Metric(
        "bits per byte",
        "",
        "cross-entropy in bits, over the bytes that the tokens stand for",
        is_log=True,
        of_model=True,
    ),
    "entropy_nats": Metric("entropy", "nats", "of the lens's distribution", of_model=True),
    "top1_agreement": Metric(
        "top-1 agreement",
        "",
        "how often lens and model like one token best",
        where_lens_is_model=1,
    ),
    "top10_agreement": Metric(
        "top-10 agreement",
        "",
        "how often the model's best token is among the lens's best ten",
        where_lens_is_model=1,
    ),
    "accuracy": Metric(
        "accuracy", "", "how often the true next token is the lens's best", of_model=True
    ),
    "bias_nats": Metric(
        "bias",
        "nats",
        "KL between the mean distributions of model and lens over the text",
        is_log=True,
        where_lens_is_model=0,
    ),
    "kl_nats_position_0": Metric(
        "KL at position 0",
        "nats",
        "KL(model ‖ lens) at the first position of a block alone",
        is_log=True,
        where_lens_is_model=0,
    ),
    "reverse_kl_nats": Metric(
        "KL(lens ‖ model)",
        "nats",
        "the KL the other way round",
        is_log=True,
        where_lens_is_model=0,
    ),
    "js_nats": Metric(
        "Jensen–Shannon", "nats", "divergence from the model, at most ln 2", where_lens_is_model=0
    ),
    "reciprocal_rank": Metric(
        "reciprocal rank", "", "mean of 1 / rank of the true next token", of_model=True
    ),
    "model_top1_rank": Metric(
        "rank of the model's best",
        "",
        "mean rank, from 1, of the model's best token",
        is_log=True,
        where_lens_is_model=1,
    ),
    "confidence": Metric(
        "confidence", "", "mean probability of the lens's best token", of_model=True
    ),
    "calibration_error": Metric(
        "calibration error",
        "",
        "mean gap between confidence and accuracy, in 15 bins of confidence",
        of_model=True,
    ),
    "prediction_depth": Metric(
        "share of tokens", "", "those whose best token no longer changes from this layer on"
    ),
    "mean_prediction_depth": Metric(
        "mean prediction depth", "layers", "mean layer from which the best token no longer changes"
    ),
}


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
