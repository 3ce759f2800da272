"""Decides from the validations of a run which layers have converged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MIN_GAIN = 0.02
"""A layer has converged if twice the tokens lower its held-out KL by less than this fraction."""
MIN_TOKENS_PER_DIMENSION = 128
"""The first pass of the default fit takes this number of tokens times d_model."""


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
    """The error of the mean over layers, clustered by block; None for a single block."""

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


class Doubling(NamedTuple):
    """The last validation, and the last one that had at most half of its tokens."""

    before: ValidationResult
    after: ValidationResult

    @property
    def gains(self) -> list[float]:
        """For every layer, the fraction by which the tokens in between lowered its held-out KL."""
        pairs = zip(self.before.kl_nats, self.after.kl_nats, strict=True)
        return [1 - after / before if before else 0.0 for before, after in pairs]


def last_doubling(history: Sequence[ValidationResult]) -> Doubling | None:
    """The validations before and after the last doubling of the steps' tokens, if there is one."""
    if not history:
        return None
    end = history[-1]
    halfway = [result for result in history if 0 < 2 * result.tokens <= end.tokens]
    return Doubling(halfway[-1], end) if halfway else None


def _gains_little(history: Sequence[ValidationResult]) -> list[bool]:
    """For every layer, whether the last doubling of its tokens hardly lowered its KL."""
    doubling = last_doubling(history)
    if doubling is None:
        return [False] * len(history[-1].kl_nats) if history else []
    pairs = zip(doubling.after.kl_nats, doubling.before.kl_nats, strict=True)
    return [now > (1 - MIN_GAIN) * then for now, then in pairs]
