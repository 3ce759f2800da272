"""Accumulates the sums of an evaluation, and computes the results from them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.config import ScoringConfig
from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import Estimates, GroupSums, RatioSums, perplexity
from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Grids, Result
from tunedlens.evaluation.scoring import TRANSFER_METRICS, Layout, ScoredBatch
from tunedlens.lenses import AffineLens, ConstantLens
from tunedlens.metrics import METRICS, per_token_metrics

BINS = 15
"""Bins of confidence, of equal width."""


class Tally:
    """Accumulates every kind of result that a config asks for.

    Sums by layer have an entry for each of the n layers, and then a mean for every set of layers
    that a lens has, or that two lenses share.

    Args:
        positions: scored positions in a block.
    """

    def __init__(self, layout: Layout, config: ScoringConfig, positions: int) -> None:
        self._layout, self._names = layout, list(layout.columns)
        n_layers, columns = layout.rows.shape
        own, pairs = layout.layers, combinations(layout.layers, 2)
        shared = ([layer for layer in one if layer in other] for one, other in pairs)
        self._sets = list(dict.fromkeys(tuple(layers) for layers in (*own, *shared) if layers))
        n_rows = n_layers + len(self._sets)
        metrics = (*per_token_metrics(config.metrics), "bits_per_byte")
        self._by_layer = {
            metric: RatioSums(n_rows, columns=columns)
            for metric in (*metrics, "kl_nats_position_0")
        }
        self._by_position = {
            metric: RatioSums(n_layers, positions, columns=columns)
            for metric in (metrics if config.by_position else ())
        }
        self._transfer = {
            metric: RatioSums(n_layers, n_layers, columns=len(layout.transfer_lenses))
            for metric in (TRANSFER_METRICS if layout.transfer_lenses else ())
        }
        self._next_layers = torch.tensor([
            [min((layer for layer in one if layer >= depth), default=n_layers)
             for depth in range(n_layers + 1)]
            for one in (*own, range(n_layers))
        ])  # fmt: skip
        """By column and depth: the first layer at this depth or later that a lens has."""
        self._depths = RatioSums(n_layers + 1, columns=columns)
        self._mean_depth = RatioSums(columns=columns)
        self._probabilities = GroupSums(
            len(layout.decodings), layout.vocab_size, device=layout.sums_device
        )
        self._calibration = GroupSums(n_layers, columns, BINS, 3)

    def add(self, batch: ScoredBatch) -> None:
        """Add the blocks of a batch."""
        counts, terms = batch.is_scored.sum(-1), _terms(batch)
        for metric, sums in self._by_layer.items():
            values, weights = terms[metric]
            sums.add(self._with_means(values.sum(-1)), weights.sum(-1))
        for metric, sums in self._by_position.items():
            values, weights = terms[metric]
            sums.add(values.movedim(-1, 1), weights.T)
        for metric, sums in self._transfer.items():
            sums.add(batch.transfer[metric], counts)
        n_layers, agrees = len(self._layout.rows), batch.values["top1_agreement"] > 0
        # From the prediction depth on, the most probable token is the model's. A layer without
        # translator agrees, so the depth moves on to the next one that has one.
        depth = n_layers - agrees.flip(0).long().cumprod(0).sum(0)
        depth = self._next_layers.gather(1, depth.flatten(1)).view_as(depth)
        has_depth = torch.arange(n_layers + 1)[:, None, None, None] == depth
        self._depths.add((has_depth & batch.is_scored).sum(-1), counts)
        self._mean_depth.add((depth * batch.is_scored).sum(-1), counts)
        groups = batch.groups.unique().to(self._probabilities.sums.device)
        self._probabilities.sums.index_add_(0, groups, batch.probability_sums)
        if "confidence" in batch.values:
            self._add_calibration(batch)

    def _add_calibration(self, batch: ScoredBatch) -> None:
        """Add confidence, accuracy and tokens to the bin of each confidence."""
        confidence, correct = batch.values["confidence"], batch.values["accuracy"]
        count = batch.is_scored.double().expand_as(correct)
        # A confidence that is NaN is reported as such elsewhere.
        bins = (confidence.nan_to_num() * BINS).long().clamp(0, BINS - 1)
        layers, columns = (torch.arange(n) for n in bins.shape[:2])
        index = (batch.groups[:, None], layers[:, None, None, None], columns[:, None, None], bins)
        sums = torch.stack([confidence, correct, count], -1)
        self._calibration.sums.index_put_(index, sums, accumulate=True)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, in each of them."""
        for ratios in (self._by_layer, self._by_position, self._transfer):
            for sums in ratios.values():
                sums.reduce(accelerator)
        for part in (self._depths, self._mean_depth, self._probabilities, self._calibration):
            part.reduce(accelerator)

    def evaluation(self, tokens_sha256: str) -> Evaluation:
        """The results.

        Raises:
            InputError: nothing was scored, or a value is not finite.
        """
        kl, bits = self._by_layer["kl_nats"], self._by_layer["bits_per_byte"]
        tokens, text_bytes = (round(float(sums.denominator[0])) for sums in (kl, bits))
        if not tokens:
            raise InputError(
                "there is nothing to score: no block has two tokens; give more text or --tokens"
            )
        if not text_bytes:  # the bytes of the tokenizer's tokens are not known
            self._by_layer.pop("bits_per_byte")
            self._by_position.pop("bits_per_byte", None)
        names, named = self._names, self._layout.columns.items()
        columns = torch.eye(len(names) + 1, dtype=torch.float64)
        pairs = [(i, j) for i in range(len(names)) for j in range(i)]
        contrasts = torch.stack([*columns, *(columns[i] - columns[j] for i, j in pairs)])
        estimates, mean_depths = self._estimates(contrasts), self._mean_depth.estimates(contrasts)
        results = list(self._results(estimates, mean_depths))
        differences = list(self._differences(pairs, estimates, mean_depths))
        _require_finite([*results, *differences])
        return Evaluation(
            results=results,
            n_layers=len(self._layout.rows),
            tokens=tokens,
            text_bytes=text_bytes,
            blocks=round(float(kl.blocks[0])),
            tokens_sha256=tokens_sha256,
            constant=[name for name, (lens, _) in named if isinstance(lens, ConstantLens)],
            sites={name: site for name, (_, site) in named if site != "resid_pre"},
            differences=differences,
            by_position=self._position_grids(),
            transfer=self._transfer_grids(),
        )

    def _estimates(self, contrasts: Float[Tensor, "contrasts columns"]) -> dict[str, Estimates]:
        """Estimates of shape [layers + means, contrasts], by metric."""
        rows = self._layout.rows
        found = {metric: sums.estimates(contrasts) for metric, sums in self._by_layer.items()}
        found["bias_nats"] = self._probabilities.jackknife(
            lambda sums: self._with_means(bias_nats(sums).cpu()[rows]) @ contrasts.mT
        )
        if "confidence" in found:
            found["calibration_error"] = self._calibration.jackknife(
                lambda sums: self._with_means(_calibration_error(sums)) @ contrasts.mT
            )
        return found

    def _results(
        self, estimates: Mapping[str, Estimates], mean_depths: Estimates
    ) -> Iterator[Result]:
        """Results of every lens and of the model, whose contrasts are the first ones."""
        n_layers, depths = len(self._layout.rows), self._depths.estimates()
        for column, lens in enumerate(self._names):
            layers = self._layout.layers[column]
            for layer in (*layers, None):
                for metric, found in estimates.items():
                    estimate = found.at(self._row(layer, layers), column)
                    yield Result(lens, layer, metric, *estimate)
                    if metric == "cross_entropy_nats" and layer is not None:
                        yield Result(lens, layer, "perplexity", *perplexity(estimate))
            for depth in (*layers, n_layers):
                yield Result(lens, depth, "prediction_depth", *depths.at(depth, column))
            yield Result(lens, None, "mean_prediction_depth", *mean_depths.at(column))
        for metric, found in estimates.items():
            if METRICS[metric].for_model:
                estimate = found.at(0, len(self._names))
                yield Result(MODEL, n_layers, metric, *estimate)
                if metric == "cross_entropy_nats":
                    yield Result(MODEL, n_layers, "perplexity", *perplexity(estimate))

    def _differences(
        self,
        pairs: Sequence[tuple[int, int]],
        estimates: Mapping[str, Estimates],
        mean_depths: Estimates,
    ) -> Iterator[Difference]:
        """Every lens minus each one before it; their contrasts follow the model's."""
        for index, (i, j) in enumerate(pairs, start=len(self._names) + 1):
            lens, other = self._names[i], self._names[j]
            own, others = self._layout.layers[i], self._layout.layers[j]
            shared = [layer for layer in own if layer in others]
            for layer in (*shared, None) if shared else ():
                for metric, found in estimates.items():
                    estimate = found.at(self._row(layer, shared), index)
                    yield Difference(lens, other, layer, metric, *estimate)
            if own == others:  # depths in other layers cannot be compared
                depth = mean_depths.at(index)
                yield Difference(lens, other, None, "mean_prediction_depth", *depth)

    def _row(self, layer: int | None, layers: Sequence[int]) -> int:
        """The entry of a layer, or of the mean over these layers."""
        return len(self._layout.rows) + self._sets.index(tuple(layers)) if layer is None else layer

    def _with_means(self, by_layer: Float[Tensor, "layers ..."]) -> Float[Tensor, "entries ..."]:
        """The values by layer, and then the mean over every set of layers."""
        means = [by_layer[[*layers]].mean(0) for layers in self._sets]
        return torch.cat([by_layer, torch.stack(means)])

    def _position_grids(self) -> Grids:
        if not self._by_position:
            return {}
        rows = [*self._layout.layers, range(len(self._layout.rows))]
        names = [*self._names, MODEL]
        grids = _grids(self._by_position, dict(zip(names, rows, strict=True)))
        grids[MODEL] = {
            metric: Grid(grid.values[:1], grid.standard_errors[:1])
            for metric, grid in grids[MODEL].items()
            if METRICS[metric].for_model
        }
        return grids

    def _transfer_grids(self) -> Grids:
        lenses = {name: self._layout.columns[name][0] for name in self._layout.transfer_lenses}
        rows = {name: lens.layers for name, lens in lenses.items() if isinstance(lens, AffineLens)}
        return _grids(self._transfer, rows, is_square=True)


def _terms(
    batch: ScoredBatch,
) -> dict[str, tuple[Float[Tensor, "layers columns batch _"], Int[Tensor, "batch _"]]]:
    """For every ratio of two totals, the values of each position and the weights."""
    terms = {metric: (values, batch.is_scored) for metric, values in batch.values.items()}
    bits = batch.values["cross_entropy_nats"] / math.log(2)
    terms["bits_per_byte"] = (bits, batch.text_bytes)
    terms["kl_nats_position_0"] = (batch.values["kl_nats"][..., :1], batch.is_scored[:, :1])
    return terms


def bias_nats(sums: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """KL of the model's mean distribution, in the last row, to each row's."""
    means = sums / sums.sum(-1, keepdim=True)
    # A probability below the smallest normal float counts as that.
    nats = means[-1].log() - means.clamp_min(torch.finfo(torch.float32).tiny).log()
    return torch.where(means[-1] > 0, means[-1] * nats, 0.0).sum(-1)


def _calibration_error(
    sums: Float[Tensor, "layers columns bins 3"],
) -> Float[Tensor, "layers columns"]:
    """The expected calibration error.

    Source:
        Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    confidence, correct, tokens = sums.unbind(-1)
    return (confidence - correct).abs().sum(-1) / tokens.sum(-1)


def _require_finite(results: Sequence[Result | Difference]) -> None:
    for result in results:
        if not math.isfinite(result.value):
            layer = "" if result.layer is None else f" at layer {result.layer}"
            raise InputError(
                f"{result.metric} of {result.lens}{layer} is {result.value}; if the lens is being "
                "trained, a smaller --lr may help"
            )


def _grids(
    sums: Mapping[str, RatioSums], layers: Mapping[str, Sequence[int]], *, is_square: bool = False
) -> Grids:
    """The grids of every lens by metric, with values in the rows of its layers.

    Args:
        sums: one column per lens.
        layers: the layers of each lens, by name.
        is_square: whether the columns are layers as well.
    """
    estimates = {metric: part.estimates() for metric, part in sums.items()}
    return {
        name: {
            metric: Grid(*(_rounded(part[..., column], own, is_square) for part in found))
            for metric, found in estimates.items()
        }
        for column, (name, own) in enumerate(layers.items())
    }


def _rounded(
    values: Float[Tensor, "rows columns"], layers: Sequence[int], is_square: bool
) -> list[list[float | None]]:
    """Round to seven digits, since grids hold many numbers; None for NaN and other layers."""
    columns = layers if is_square else range(values.shape[1])
    return [
        [
            float(f"{value:.7g}")
            if math.isfinite(value) and row in layers and column in columns
            else None
            for column, value in enumerate(line)
        ]
        for row, line in enumerate(values.tolist())
    ]
