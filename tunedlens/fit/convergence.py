"""Validations of a run, and which layers have converged according to them."""

from collections.abc import Sequence
from dataclasses import dataclass

MIN_GAIN = 0.02
"""The fraction of its held-out KL that a layer gains at least from twice the tokens."""


@dataclass
class ValidationResult:
    """Held-out KL at one step, which is `seconds` after the run began."""

    step: int
    tokens: int
    """Positions that the steps have trained on."""
    seconds: float
    kl_nats: list[float]
    """One value per layer."""
    standard_error: float | None = None
    """Of the mean over layers, clustered by block. A single block has none."""

    @property
    def mean_kl_nats(self) -> float:
        return sum(self.kl_nats) / len(self.kl_nats)


def converged_layers(history: Sequence[ValidationResult]) -> list[bool]:
    """For every layer, whether two validations in a row show almost no gain from more tokens.

    A single validation may be misled by the noise of the steps. A layer that is no longer
    trained stays converged, because its KL stays the same.
    """
    last, before = _gains_little(history), _gains_little(history[:-1])
    return [now and then for now, then in zip(last, before or last, strict=True)]


def _gains_little(history: Sequence[ValidationResult]) -> list[bool]:
    """For every layer, whether the last doubling of its tokens hardly lowered its KL."""
    if not history:
        return []
    end = history[-1]
    halfway = [result for result in history if 0 < 2 * result.tokens <= end.tokens]
    if not halfway:
        return [False] * len(end.kl_nats)
    pairs = zip(end.kl_nats, halfway[-1].kl_nats, strict=True)
    return [now > (1 - MIN_GAIN) * then for now, then in pairs]
