"""Every figure that an evaluation reports: its name, what it is called, its unit."""

from typing import NamedTuple


class Metric(NamedTuple):
    """How a figure is shown, and what it says."""

    label: str
    unit: str
    meaning: str
    is_log: bool = False
    """Whether it is drawn on a log scale."""

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


METRICS = {
    "kl_nats": Metric(
        "KL(model ‖ lens)", "nats", "how far the lens is from what the model says in the end", True
    ),
    "cross_entropy_nats": Metric(
        "cross-entropy", "nats", "minus log probability of the true next token"
    ),
    "perplexity": Metric("perplexity", "", "exp of the mean cross-entropy", True),
    "bits_per_byte": Metric(
        "bits per byte", "", "cross-entropy in bits, over the bytes that the tokens stand for"
    ),
    "entropy_nats": Metric("entropy", "nats", "of the lens's distribution"),
    "top1_agreement": Metric("top-1 agreement", "", "how often lens and model like one token best"),
    "top10_agreement": Metric(
        "top-10 agreement", "", "how often the model's best token is among the lens's best ten"
    ),
    "accuracy": Metric("accuracy", "", "how often the true next token is the lens's best"),
    "bias_nats": Metric(
        "bias", "nats", "KL between the mean distributions of model and lens over the text", True
    ),
    "kl_nats_position_0": Metric(
        "KL at position 0", "nats", "KL(model ‖ lens) at the first position of a block alone", True
    ),
    "reverse_kl_nats": Metric("KL(lens ‖ model)", "nats", "the KL the other way round", True),
    "js_nats": Metric("Jensen–Shannon", "nats", "divergence from the model, at most ln 2"),
    "reciprocal_rank": Metric("reciprocal rank", "", "mean of 1 / rank of the true next token"),
    "model_top1_rank": Metric(
        "rank of the model's best", "", "mean rank, from 1, of the model's best token", True
    ),
    "confidence": Metric("confidence", "", "mean probability of the lens's best token"),
    "calibration_error": Metric(
        "calibration error",
        "",
        "mean gap between confidence and accuracy, in 15 bins of confidence",
    ),
    "prediction_depth": Metric(
        "share of tokens", "", "those whose best token no longer changes from this layer on"
    ),
    "mean_prediction_depth": Metric(
        "mean prediction depth", "layers", "mean layer from which the best token no longer changes"
    ),
}
