"""The savings and the cost of early exits, as plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from tunedlens.early_exit.rules import ExitRule, Signal
from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import Estimate, perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ExitPoint:
    """A rule on one half of a text: means over tokens, with errors clustered by block."""

    threshold: float
    layers_saved: Estimate
    """The number of blocks after the layer whose prediction is taken."""
    agreement: Estimate
    """The fraction of tokens where that prediction has the model's most probable token."""
    cross_entropy_nats: Estimate
    """The cross-entropy of the true next token."""
    extra_nats: Estimate
    """The paired difference of this cross-entropy and the model's own."""

    @property
    def perplexity(self) -> Estimate:
        """`exp` of the mean cross-entropy."""
        return perplexity(self.cross_entropy_nats)

    @property
    def perplexity_ratio(self) -> Estimate:
        """The perplexity, divided by the model's."""
        return perplexity(self.extra_nats)


@dataclass(frozen=True)
class ExitCurve:
    """A point for every threshold on each half of a text. With the first one, no token exits."""

    first_half: list[ExitPoint]
    """The half where thresholds are chosen."""
    second_half: list[ExitPoint]
    """The half where thresholds are tested."""


class ChosenExit(NamedTuple):
    """A rule that was chosen on one half of a text and tested on the other."""

    rule: ExitRule
    chosen: ExitPoint
    tested: ExitPoint


@dataclass(frozen=True)
class EarlyExits:
    """The layers saved and the cost for every lens, signal and threshold on a corpus."""

    # Bound in `tunedlens/__init__.py`, from `tunedlens.report`.
    table: ClassVar[Callable[..., str]]
    plot: ClassVar[Callable[..., "Figure"]]

    n_layers: int
    tokens: int
    """Scored positions on both halves."""
    blocks: int
    tokens_sha256: str
    """Hash of the token ids (int32) of the scored blocks."""
    first_layer: int
    """Layers before it are not read."""
    curves: dict[str, dict[Signal, ExitCurve]]
    """By lens and signal."""

    def __repr__(self) -> str:
        return (
            f"EarlyExits(lenses: {', '.join(self.curves)}; {self.n_layers} layers, "
            f"{self.tokens:,} positions)"
        )

    @property
    def model_perplexity(self) -> Estimate:
        """The perplexity of the model itself on the second half."""
        first_lens = next(iter(self.curves.values()))
        return first_lens["entropy"].second_half[0].perplexity

    def curve(self, lens: str, signal: Signal) -> ExitCurve:
        """The curve of one lens and signal.

        Raises:
            InputError: there is no such lens or signal.
        """
        if lens not in self.curves:
            raise InputError(f"lens must be one of {', '.join(self.curves)}; got {lens!r}")
        if signal not in self.curves[lens]:
            names = ", ".join(self.curves[lens])
            raise InputError(f"signal must be one of {names}; got {signal!r}")
        return self.curves[lens][signal]

    def choose(
        self,
        lens: str,
        signal: Signal,
        *,
        agreement: float | None = None,
        perplexity_ratio: float | None = None,
    ) -> ChosenExit:
        """Choose the threshold that saves the most layers on the first half, within a limit.

        Give one of the two limits.

        Args:
            agreement: the lowest agreement with the model that is allowed, from 0 to 1.
            perplexity_ratio: the highest perplexity that is allowed, as a multiple of the model's.

        Raises:
            InputError: there is no such lens or signal, not exactly one limit is given, or the
                limit is out of range.
        """
        curve = self.curve(lens, signal)
        if (agreement is None) == (perplexity_ratio is None):
            raise InputError("give either agreement or perplexity_ratio as the limit")
        if agreement is not None:
            if not 0 <= agreement <= 1:
                raise InputError(f"agreement must be between 0 and 1, got {agreement}")
            is_within = [point.agreement.value >= agreement for point in curve.first_half]
        else:
            assert perplexity_ratio is not None
            if not perplexity_ratio >= 1:
                raise InputError(f"perplexity_ratio must be 1 or more, got {perplexity_ratio}")
            is_within = [
                point.perplexity_ratio.value <= perplexity_ratio for point in curve.first_half
            ]
        best = max(
            (index for index, is_so in enumerate(is_within) if is_so),
            key=lambda index: curve.first_half[index].layers_saved.value,
        )
        chosen, tested = curve.first_half[best], curve.second_half[best]
        return ChosenExit(ExitRule(signal, chosen.threshold, self.first_layer), chosen, tested)
