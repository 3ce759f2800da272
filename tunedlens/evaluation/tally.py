"""All that is summed during an evaluation, and the results from these sums."""

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from tunedlens.config import ScoringConfig
from tunedlens.errors import InputError
from tunedlens.evaluation.accumulators import (
    Accumulator,
    Bias,
    ByLayer,
    ByPosition,
    Calibration,
    PredictionDepth,
    Ratios,
    Transfer,
)
from tunedlens.evaluation.batches import TRANSFER_METRICS, Layout, ScoredBatch
from tunedlens.evaluation.estimates import Estimates, perplexity
from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Grids, Result
from tunedlens.lenses import ConstantLens
from tunedlens.metrics import METRICS, per_token_metrics


class Tally:
    """Accumulates every kind of result that a config asks for.

    Args:
        layout: the lenses.
        config: says which results.
        vocab_size: size of the model's vocabulary.
        positions: scored positions in a block.
        device: where sums of whole distributions are kept.
    """

    def __init__(
        self,
        layout: Layout,
        config: ScoringConfig,
        *,
        vocab_size: int,
        positions: int,
        device: torch.device,
    ) -> None:
        self._layout, self._names = layout, list(layout.lenses)
        metrics = per_token_metrics(config.metrics)
        self._ratios = Ratios(layout, metrics)
        self._by_layer: list[ByLayer] = [self._ratios, Bias(layout, vocab_size, device)]
        if "confidence" in metrics:
            self._by_layer.append(Calibration(layout))
        self._depth = PredictionDepth(layout)
        self._by_position = ByPosition(layout, metrics, positions) if config.by_position else None
        self._transfer = Transfer(layout) if layout.transfer_lenses else None

    @property
    def _parts(self) -> list[Accumulator]:
        parts = (*self._by_layer, self._depth, self._by_position, self._transfer)
        return [part for part in parts if part is not None]

    def add(self, batch: ScoredBatch) -> None:
        """Add the blocks of a batch."""
        for part in self._parts:
            part.add(batch)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, in each of them."""
        for part in self._parts:
            part.sums.reduce(accelerator)

    def evaluation(self, tokens_sha256: str) -> Evaluation:
        """The results.

        Args:
            tokens_sha256: hash of the scored token ids.

        Raises:
            InputError: nothing was scored, or a value is not finite.
        """
        tokens, text_bytes = self._ratios.tokens, self._ratios.text_bytes
        if not tokens or not text_bytes:
            raise InputError(
                f"there is nothing to score: {tokens} tokens for {text_bytes} bytes of text; "
                "give more text or --tokens, or a smaller --seq-len"
            )
        results, differences = list(self._results()), list(self._differences())
        _require_finite([*results, *differences])
        lenses = self._layout.lenses.items()
        return Evaluation(
            results=results,
            n_layers=len(self._layout.rows),
            tokens=tokens,
            text_bytes=text_bytes,
            blocks=self._ratios.blocks,
            tokens_sha256=tokens_sha256,
            constant=[name for name, lens in lenses if isinstance(lens, ConstantLens)],
            differences=differences,
            by_position=self._position_grids(),
            transfer=self._transfer_grids(),
        )

    def _estimates(self, contrasts: Float[Tensor, "contrasts columns"]) -> dict[str, Estimates]:
        """Estimates of shape [layers + 1, contrasts], by metric; the last layer is the mean."""
        parts = [part.estimates(contrasts) for part in self._by_layer]
        return {metric: found for part in parts for metric, found in part.items()}

    def _layers(self) -> tuple[int | None, ...]:
        """The layers in the order of the estimates; None is the mean over layers."""
        return (*range(len(self._layout.rows)), None)

    def _results(self) -> Iterator[Result]:
        n_layers, n_columns = self._layout.rows.shape
        columns = torch.eye(n_columns, dtype=torch.float64)
        estimates = self._estimates(columns)
        fractions, mean_depths = self._depth.fractions(), self._depth.mean(columns)
        for column, lens in enumerate(self._names):
            for row, layer in enumerate(self._layers()):
                for metric, found in estimates.items():
                    estimate = found.at(row, column)
                    yield Result(lens, layer, metric, *estimate)
                    if metric == "cross_entropy_nats" and layer is not None:
                        yield Result(lens, layer, "perplexity", *perplexity(estimate))
            for depth in range(n_layers + 1):
                yield Result(lens, depth, "prediction_depth", *fractions.at(depth, column))
            yield Result(lens, None, "mean_prediction_depth", *mean_depths.at(column))
        for metric, found in estimates.items():
            if METRICS[metric].for_model:
                estimate = found.at(0, -1)
                yield Result(MODEL, n_layers, metric, *estimate)
                if metric == "cross_entropy_nats":
                    yield Result(MODEL, n_layers, "perplexity", *perplexity(estimate))

    def _differences(self) -> Iterator[Difference]:
        """Every lens minus each one before it."""
        pairs = [(i, j) for i in range(len(self._names)) for j in range(i)]
        if not pairs:
            return
        columns = torch.eye(len(self._names) + 1, dtype=torch.float64)
        contrasts = torch.stack([columns[i] - columns[j] for i, j in pairs])
        estimates, mean_depths = self._estimates(contrasts), self._depth.mean(contrasts)
        for index, (i, j) in enumerate(pairs):
            lens, other = self._names[i], self._names[j]
            for row, layer in enumerate(self._layers()):
                for metric, found in estimates.items():
                    yield Difference(lens, other, layer, metric, *found.at(row, index))
            depth = mean_depths.at(index)
            yield Difference(lens, other, None, "mean_prediction_depth", *depth)

    def _position_grids(self) -> Grids:
        if self._by_position is None:
            return {}
        metrics, estimates = self._by_position.metrics, self._by_position.estimates()
        grids: Grids = {
            lens: {
                metric: _grid(*(part[index, ..., column] for part in estimates))
                for index, metric in enumerate(metrics)
            }
            for column, lens in enumerate(self._names)
        }
        grids[MODEL] = {
            metric: _grid(*(part[index, :1, :, -1] for part in estimates))
            for index, metric in enumerate(metrics)
            if METRICS[metric].for_model
        }
        return grids

    def _transfer_grids(self) -> Grids:
        if self._transfer is None:
            return {}
        estimates = self._transfer.estimates()
        return {
            lens: {
                metric: _grid(*(part[index, ..., column] for part in estimates))
                for index, metric in enumerate(TRANSFER_METRICS)
            }
            for column, lens in enumerate(self._layout.transfer_lenses)
        }


def _require_finite(results: list[Result | Difference]) -> None:
    for result in results:
        if not math.isfinite(result.value):
            layer = "" if result.layer is None else f" at layer {result.layer}"
            raise InputError(
                f"{result.metric} of {result.lens}{layer} is {result.value}; if the lens is being "
                "trained, a smaller --lr may help"
            )


def _grid(values: Float[Tensor, "rows columns"], errors: Float[Tensor, "rows columns"]) -> Grid:
    rows = [[[_rounded(x) for x in row] for row in part.tolist()] for part in (values, errors)]
    return Grid(*rows)


def _rounded(value: float) -> float | None:
    """To seven digits, since grids hold many numbers; None for NaN."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
