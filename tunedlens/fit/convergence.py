"""Validations of a run, and which layers have converged according to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MIN_GAIN = 0.02
"""The fraction of its held-out KL that a layer gains at least from twice the tokens."""
MIN_TOKENS_PER_DIMENSION = 128
"""Times d_model, the tokens of the default fit's first pass."""


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


class Doubling(NamedTuple):
    """The last validation, and the last one at no more than half of its tokens."""

    before: ValidationResult
    after: ValidationResult

    @property
    def gains(self) -> list[float]:
        """For every layer, the fraction of its held-out KL that the tokens between them saved."""
        pairs = zip(self.before.kl_nats, self.after.kl_nats, strict=True)
        return [1 - after / before if before else 0.0 for before, after in pairs]


def last_doubling(history: Sequence[ValidationResult]) -> Doubling | None:
    """What the last doubling of the tokens of the steps led to; None if there is none."""
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
