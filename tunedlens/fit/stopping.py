"""The learning curve, and what it says of which layers are done."""

from dataclasses import dataclass, field

FLAT = 0.01
"""A layer is done once doubling its tokens lowered its held-out KL by less than this share."""


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

    @property
    def mean_kl_nats(self) -> float:
        """Over layers."""
        return sum(self.kl_nats) / len(self.kl_nats)


@dataclass
class LearningCurve:
    """Held-out KL against tokens and seconds; JSON-able by `asdict`."""

    looks: list[Look] = field(default_factory=list)

    def flat_layers(self) -> list[bool]:
        """For every layer, whether its last doubling of tokens hardly lowered its KL.

        A layer that has been left alone stays flat, as its KL stays what it is.
        """
        last = self.looks[-1]
        before = [look for look in self.looks if 0 < 2 * look.tokens <= last.tokens]
        if not before:
            return [False] * len(last.kl_nats)
        pairs = zip(last.kl_nats, before[-1].kl_nats, strict=True)
        return [now > (1 - FLAT) * then for now, then in pairs]
