"""The learning curve, and what it says of which layers are done."""

from dataclasses import dataclass, field

FLAT = 0.02
"""A layer is flat where doubling its tokens lowered its held-out KL by less than this fraction."""


@dataclass
class Look:
    """Held-out text, looked at once."""

    step: int
    tokens: int
    """Positions whose KL was a part of the gradient."""
    seconds: float
    """Since the run began, looks included."""
    kl_nats: list[float]
    """Of every layer."""
    standard_error: float | None = None
    """Of the mean over layers, clustered by block; None where there is a single block."""

    @property
    def mean_kl_nats(self) -> float:
        """Over layers."""
        return sum(self.kl_nats) / len(self.kl_nats)


@dataclass
class LearningCurve:
    """Held-out KL against tokens and seconds; JSON-able by `asdict`."""

    looks: list[Look] = field(default_factory=list)

    def flat_layers(self) -> list[bool]:
        """For every layer, whether two looks running say that doubling hardly lowered its KL.

        One look alone may be misled by the noise of the steps. A layer that has been left
        alone stays flat, as its KL stays what it is.
        """
        last, before = self._flat_at(self.looks), self._flat_at(self.looks[:-1])
        return [now and then for now, then in zip(last, before or last, strict=True)]

    @staticmethod
    def _flat_at(looks: list[Look]) -> list[bool]:
        """For every layer, whether the last of these looks found it flat; none without looks."""
        halfway = [look for look in looks if 0 < 2 * look.tokens <= looks[-1].tokens]
        if not halfway:
            return [False for _ in looks[-1].kl_nats] if looks else []
        pairs = zip(looks[-1].kl_nats, halfway[-1].kl_nats, strict=True)
        return [now > (1 - FLAT) * then for now, then in pairs]
