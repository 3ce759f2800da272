"""What is measured: at a position, over a corpus, and what it is called."""

from tunedlens.metrics.catalogue import METRICS, Metric
from tunedlens.metrics.pointwise import (
    cross_entropy,
    entropy,
    js_divergence,
    kl_divergence,
    kl_from_log_probs,
    log_probs,
    rank,
    total_variation,
)
from tunedlens.metrics.sums import (
    GROUPS,
    Estimate,
    GroupSums,
    RatioSums,
    estimates,
    jackknife,
    perplexity,
    reduce_sums,
)

__all__ = [
    "GROUPS",
    "METRICS",
    "Estimate",
    "GroupSums",
    "Metric",
    "RatioSums",
    "cross_entropy",
    "entropy",
    "estimates",
    "jackknife",
    "js_divergence",
    "kl_divergence",
    "kl_from_log_probs",
    "log_probs",
    "perplexity",
    "rank",
    "reduce_sums",
    "total_variation",
]
