"""Rules for the layer at which a token exits."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens.errors import InputError

Signal = Literal["entropy", "confidence", "agreement"]
SIGNALS: dict[Signal, str] = {
    "entropy": "entropy_nats",
    "confidence": "confidence",
    "agreement": "top1_id",
}
"""The statistic of `engine.LensStatistics` that each signal is computed from."""

ByLayer = Float[Tensor, "layers *positions"]
IsMet = Bool[Tensor, "layers *positions"]


@dataclass(frozen=True)
class ExitRule:
    """Takes the prediction of the first layer whose signal passes a threshold.

    If no layer passes it, the model's own prediction is taken. The layers are those that the lens
    reads, from `first_layer` to the last.

    Raises:
        InputError: there is no such signal, or the threshold is outside its range.
    """

    signal: Signal
    """The `entropy` of the layer's distribution; the probability of its most probable token
    (`confidence`); or the number of layers in a row, up to this one, with the same most probable
    token (`agreement`)."""
    threshold: float
    """An entropy (in nats) must be below the threshold, a probability above it, and a number of
    layers equal to it or larger."""
    first_layer: int = 0
    """Earlier layers are not read. At early layers, a lens may give a high probability to a wrong
    token."""

    def __post_init__(self) -> None:
        if self.signal not in get_args(Signal):
            raise InputError(
                f"signal must be one of {', '.join(get_args(Signal))}; got {self.signal!r}"
            )
        expected, is_right = {
            "entropy": ("0 or more nats", 0 <= self.threshold < math.inf),
            "confidence": ("between 0 and 1", 0 <= self.threshold <= 1),
            "agreement": (
                "a whole number of layers, 1 or more",
                1 <= self.threshold < math.inf and self.threshold % 1 == 0,
            ),
        }[self.signal]
        if not is_right:
            raise InputError(
                f"the threshold of {self.signal} must be {expected}; got {self.threshold}"
            )
        if self.first_layer < 0:
            raise InputError(f"first_layer must be 0 or more, got {self.first_layer}")

    def is_met(self, signal: ByLayer) -> IsMet:
        """Whether a layer passes the threshold, given the values of `signal_of`."""
        if self.signal == "entropy":
            return signal < self.threshold
        if self.signal == "confidence":
            return signal > self.threshold
        return signal >= self.threshold


def signal_of(signal: Signal, statistic: ByLayer) -> ByLayer:
    """The values of a signal, given its statistic in `SIGNALS` at the layers in order."""
    if signal == "entropy":
        return statistic.clamp(min=0)  # rounding can make it negative
    if signal == "confidence":
        return statistic.clamp(max=1)
    lengths = [torch.ones_like(statistic[0])]
    for previous, current in pairwise(statistic):
        lengths.append(torch.where(current == previous, lengths[-1] + 1, 1))
    return torch.stack(lengths)


def first_exit(rule: ExitRule, signal: ByLayer) -> Int[Tensor, "*positions"]:
    """The index of the first layer that meets the rule; the number of layers if none does."""
    return (~rule.is_met(signal)).long().cumprod(0).sum(0)
