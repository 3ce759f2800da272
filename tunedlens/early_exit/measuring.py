"""Measures the savings and the cost of every threshold on a corpus, in one pass."""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.config import ScoringConfig
from tunedlens.devices import float32_products
from tunedlens.early_exit.results import EarlyExits, ExitCurve, ExitPoint
from tunedlens.early_exit.rules import SIGNALS, ExitRule, Signal, first_exit, signal_of
from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import RatioSums
from tunedlens.evaluation.pipeline import numbered_blocks
from tunedlens.evaluation.scoring import Layout, ScoredBatch, Scorer
from tunedlens.lenses import Lens, require_made_for
from tunedlens.model import FrozenModel

_COSTS = ("top1_agreement", "cross_entropy_nats")
_METRICS = (*_COSTS, *SIGNALS.values())
_HALVES = 2


@float32_products()
def early_exits(
    model: FrozenModel,
    lenses: Mapping[str, Lens],
    blocks: Iterable[Int[Tensor, " seq"]],
    config: ScoringConfig | None = None,
    *,
    first_layer: int = 0,
) -> EarlyExits:
    """Measure the layers saved and the cost of early exits, for every lens, signal and threshold.

    Blocks alternate between the half of the text where thresholds are chosen and the half where
    they are tested. A lens without translators is read at the layers of the others.

    Args:
        lenses: the lenses by name.
        blocks: token ids, in blocks of equal length.
        config: the largest number of positions, and the batch size.
        first_layer: see `ExitRule`.

    Raises:
        InputError: there are not two blocks, blocks differ in length, a lens belongs to another
            model, or no layer is read.
    """
    require_made_for(model, lenses)
    config = config or ScoringConfig()
    layout = Layout.of(model, lenses, transfer=False)
    scorer, tallies = Scorer(model, layout, _METRICS), _tallies(layout, first_layer)
    if not tallies:
        raise InputError(
            f"no lens reads the residual stream at layer {first_layer} or later; give a lens that "
            "does, or an earlier first_layer"
        )
    digest, numbers = hashlib.sha256(), []
    numbered = numbered_blocks(blocks, config.tokens, digest.update)
    while batch := list(islice(numbered, config.batch_size)):
        scored = scorer.score(batch)
        numbers += [block.number for block in batch if block.scored]
        half = torch.tensor([block.number % _HALVES for block in batch])
        for tally in tallies:
            tally.add(scored, half)
    if len(numbers) < _HALVES:
        raise InputError(
            "early exits need two blocks of text, to choose thresholds on one and test them on "
            f"the other; got {len(numbers)}"
        )
    curves: dict[str, dict[Signal, ExitCurve]] = {}
    for tally in tallies:
        curves.setdefault(tally.lens, {})[tally.signal] = tally.curve()
    tokens = round(float(tallies[0].sums.denominator[:, 0].sum()))
    return EarlyExits(
        len(layout.rows), tokens, len(numbers), digest.hexdigest(), first_layer, curves
    )


def rules_of(signal: Signal, n_layers: int, vocab_size: int) -> list[ExitRule]:
    """Rules, from one that never exits to one that nearly always exits."""
    if signal == "agreement":
        return [ExitRule(signal, count) for count in range(n_layers + 1, 0, -1)]
    if signal == "confidence":
        evenly = torch.linspace(7, -4, 45).sigmoid()
        return [ExitRule(signal, threshold) for threshold in (1.0, *_short(evenly))]
    largest = torch.tensor(float(vocab_size)).log()
    evenly = torch.logspace(-3, float(largest.log10()), 45)
    return [ExitRule(signal, threshold) for threshold in (0.0, *_short(evenly))]


def _short(values: Float[Tensor, " thresholds"]) -> list[float]:
    """Round to four digits."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def _tallies(layout: Layout, first_layer: int) -> list["_Tally"]:
    """A tally for every signal and every lens that reads the stream."""
    tallies = []
    for column, (_, site) in enumerate(layout.columns.values()):
        layers = [layer for layer in layout.layers[column] if layer >= first_layer]
        if site == "resid_pre" and layers:
            tallies += [_Tally(layout, column, layers, signal) for signal in SIGNALS]
    return tallies


class _Tally:
    """Sums of layers saved, agreement and cross-entropy by half and rule."""

    def __init__(self, layout: Layout, column: int, layers: list[int], signal: Signal) -> None:
        self.lens, self.signal = list(layout.columns)[column], signal
        self._column, self._layers = column, layers
        n_layers = len(layout.rows)
        self._rules = rules_of(signal, len(self._layers), layout.vocab_size)
        self._saved = torch.tensor([n_layers - layer for layer in (*self._layers, n_layers)])
        self.sums = RatioSums(_HALVES, len(self._rules), columns=4)

    def add(self, batch: ScoredBatch, half: Int[Tensor, " batch"]) -> None:
        values = {
            # The model's own column is the last one; it is the same at every layer.
            name: torch.cat([one[self._layers, self._column], one[:1, -1]])
            for name, one in batch.values.items()
        }
        signal = signal_of(self.signal, values[SIGNALS[self.signal]][:-1])
        totals = []
        for rule in self._rules:
            exits = first_exit(rule, signal)
            chosen = [values[name].gather(0, exits[None])[0] for name in _COSTS]
            of_model = values["cross_entropy_nats"][-1]
            of_rule = torch.stack([self._saved[exits].double(), *chosen, of_model])
            totals.append((of_rule * batch.is_scored).sum(-1))
        is_in_half = half == torch.arange(_HALVES)[:, None]
        counts = is_in_half * batch.is_scored.sum(-1)
        self.sums.add(torch.stack(totals).expand(_HALVES, -1, -1, -1), counts[:, None])

    def curve(self) -> ExitCurve:
        # Layers saved, agreement, cross-entropy and its paired difference from the model's.
        contrasts = torch.eye(4)
        contrasts[3, 2:] = torch.tensor([1.0, -1.0])
        estimates = self.sums.estimates(contrasts)
        halves = []
        for half in range(_HALVES):
            points = []
            for index, rule in enumerate(self._rules):
                found = [estimates.at(half, index, one) for one in range(4)]
                points.append(ExitPoint(rule.threshold, *found))
            halves.append(points)
        return ExitCurve(*halves)
