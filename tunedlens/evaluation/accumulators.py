"""Sums of everything that is reported over the blocks seen so far, and the figures from them."""

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens.distributed import reduce_sums
from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import (
    Estimate,
    GroupSums,
    RatioSums,
    jackknife,
    perplexity,
    to_estimates,
)
from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Result
from tunedlens.metrics import METRICS

_STANDARD = (
    "kl_nats",
    "cross_entropy_nats",
    "entropy_nats",
    "top1_agreement",
    "top10_agreement",
    "accuracy",
)
_EXTENDED = ("reverse_kl_nats", "js_nats", "reciprocal_rank", "model_top1_rank", "confidence")

OF_TRANSFER = ("kl_nats", "cross_entropy_nats")
"""Figures of a translator at another layer, as they stand in what is added."""

BINS = 15
"""Of confidence, all of one width."""


def per_token(extended: bool) -> tuple[str, ...]:
    """Names of the figures of a position: the standard ones, or all that there are."""
    return _STANDARD + _EXTENDED if extended else _STANDARD


class Tally:
    """Adds up figures by block; its columns are the lenses and, last, the model itself.

    What is said of layers is also said of their mean, which has the last place among them.

    Args:
        names: of the lenses.
        rows: for every column, where the figures of each layer stand in what is added.
        metrics: names of the figures of a position, as they stand in what is added.
        distributions: sums of the probabilities of every row.
        transferred: names of the lenses whose translators are used at every layer.
        positions: how many there are in a block, if each is to be told apart.
    """

    def __init__(
        self,
        names: list[str],
        rows: list[list[int]],
        metrics: tuple[str, ...],
        distributions: GroupSums,
        *,
        transferred: list[str],
        positions: int | None,
    ) -> None:
        self._names, self._rows, self._metrics = names, torch.tensor(rows), metrics
        self._transferred = transferred
        self._n_layers = n_layers = len(rows[0])
        columns, n_rows = len(rows), distributions.sums.shape[1]
        self._per_token = RatioSums(len(metrics), n_layers + 1, columns=columns)
        self._bits = RatioSums(n_layers + 1, columns=columns)
        self._first = RatioSums(n_layers + 1, columns=columns)
        self._depth = RatioSums(n_layers + 1, columns=columns)
        self._mean_depth = RatioSums(columns=columns)
        self._group_tokens = GroupSums()
        self._distributions = distributions
        self._calibration = GroupSums(n_rows, BINS, 3) if "confidence" in metrics else None
        self._transfer = RatioSums(len(OF_TRANSFER), n_layers, n_layers, columns=len(transferred))
        self._positions = self._position_bits = None
        if positions is not None:
            self._positions = RatioSums(len(metrics), n_layers, positions, columns=columns)
            self._position_bits = RatioSums(n_layers, positions, columns=columns)

    def add(
        self,
        figures: Float[Tensor, "metrics rows batch positions"],
        transfer: Float[Tensor, "2 translators layers lenses batch"],
        scored: Bool[Tensor, "batch positions"],
        text_bytes: Int[Tensor, "batch positions"],
        groups: Int[Tensor, " batch"],
    ) -> None:
        """Count further blocks.

        Args:
            figures: of every position; they count where it is scored.
            transfer: summed KL and cross-entropy of every translator at every layer.
            scored: which positions are.
            text_bytes: that the predicted tokens stand for.
            groups: of the jackknife.
        """
        figures = torch.where(scored, figures.double(), 0.0)
        counts, text_bytes = scored.sum(-1), text_bytes * scored
        by_layer = figures[:, self._rows].transpose(1, 2)  # columns last but batch, positions
        with_mean = torch.cat([by_layer, by_layer.mean(1, keepdim=True)], 1)
        bits = with_mean[self._metrics.index("cross_entropy_nats")] / math.log(2)
        kl, agreed = (self._metrics.index(name) for name in ("kl_nats", "top1_agreement"))
        self._per_token.add(with_mean.sum(-1), counts)
        self._bits.add(bits.sum(-1), text_bytes.sum(-1))
        self._first.add(with_mean[kl, ..., 0], scored[:, 0])
        self._transfer.add(transfer, counts)
        self._group_tokens.sums.index_add_(0, groups, counts.double())
        self._add_depths(by_layer[agreed] > 0, scored, counts)
        if self._calibration is not None:
            self._add_calibration(self._calibration, figures, scored, groups)
        if self._positions is not None and self._position_bits is not None:
            self._positions.add(by_layer.movedim(-1, 2), scored.T)
            self._position_bits.add(bits[:-1].movedim(-1, 1), text_bytes.T)

    def _add_depths(
        self,
        agrees: Bool[Tensor, "layers columns batch positions"],
        scored: Bool[Tensor, "batch positions"],
        counts: Int[Tensor, " batch"],
    ) -> None:
        # Where the best token no longer changes it is the model's.
        unchanged = agrees.flip(0).long().cumprod(0).sum(0)
        depth = self._n_layers - unchanged
        shares = torch.nn.functional.one_hot(depth, self._n_layers + 1) * scored[..., None]
        self._depth.add(shares.sum(2).movedim(-1, 0), counts)
        self._mean_depth.add((depth * scored).sum(-1), counts)

    def _add_calibration(
        self,
        sums: GroupSums,
        figures: Float[Tensor, "metrics rows batch positions"],
        scored: Bool[Tensor, "batch positions"],
        groups: Int[Tensor, " batch"],
    ) -> None:
        confidence = figures[self._metrics.index("confidence")]
        correct = figures[self._metrics.index("accuracy")]
        values = torch.stack([confidence, correct, scored.double().expand_as(correct)], -1)
        # What is not a number is said of the figures themselves, later.
        bins = (confidence.nan_to_num() * BINS).long().clamp(0, BINS - 1)
        rows = torch.arange(len(bins))[:, None, None]
        index = (groups[:, None] * len(bins) + rows) * BINS + bins
        sums.sums.view(-1, 3).index_add_(0, index.flatten(), values.flatten(0, 2))

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, in each of them."""
        for part in vars(self).values():
            if isinstance(part, RatioSums):
                reduce_sums(accelerator, part.moments)
            elif isinstance(part, GroupSums):
                reduce_sums(accelerator, part.sums)

    def evaluation(self, constant: list[str], tokens_sha256: str) -> Evaluation:
        """The figures.

        Args:
            constant: names of the lenses that are the same at every layer.
            tokens_sha256: of what was scored.

        Raises:
            InputError: there is nothing to score, or a figure is not finite.
        """
        tokens, text_bytes = float(self._mean_depth.denominator), float(self._bits.denominator[0])
        if not tokens or not text_bytes:
            raise InputError(
                f"there is nothing to score: {tokens:.0f} tokens for {text_bytes:.0f} bytes of "
                "text; give more text or --tokens, or a smaller --seq-len"
            )
        replicates = self._replicates()
        results = list(self._results(replicates))
        differences = list(self._differences(replicates))
        figures: list[Result | Difference] = [*results, *differences]
        for figure in figures:
            if not math.isfinite(figure.value):
                layer = "" if figure.layer is None else f" at layer {figure.layer}"
                raise InputError(
                    f"{figure.metric} of {figure.lens}{layer} is {figure.value}; where it is "
                    "being trained, a smaller --lr may help"
                )
        return Evaluation(
            results=results,
            n_layers=self._n_layers,
            tokens=round(tokens),
            text_bytes=round(text_bytes),
            blocks=round(float(self._mean_depth.blocks)),
            tokens_sha256=tokens_sha256,
            constant=constant,
            differences=differences,
            by_position=self._position_grids(),
            transfer=self._transfer_grids(),
        )

    def _results(self, replicates: dict[str, Tensor]) -> Iterator[Result]:
        n_layers = self._n_layers
        columns = torch.eye(len(self._names) + 1, dtype=torch.float64)
        figures = self._by_layer(columns, replicates)
        depths = _rows(*self._depth.estimates())
        mean_depths = _rows(*self._mean_depth.estimates())[0]
        for column, lens in enumerate(self._names):
            for layer in (*range(n_layers), None):
                for metric, found in figures.items():
                    estimate = found[-1 if layer is None else layer][column]
                    yield Result(lens, layer, metric, *estimate)
                    if metric == "cross_entropy_nats" and layer is not None:
                        yield Result(lens, layer, "perplexity", *perplexity(estimate))
            for layer, shares in enumerate(depths):
                yield Result(lens, layer, "prediction_depth", *shares[column])
            yield Result(lens, None, "mean_prediction_depth", *mean_depths[column])
        for metric, found in figures.items():
            if METRICS[metric].of_model:
                yield Result(MODEL, n_layers, metric, *found[0][-1])
                if metric == "cross_entropy_nats":
                    yield Result(MODEL, n_layers, "perplexity", *perplexity(found[0][-1]))

    def _differences(self, replicates: dict[str, Tensor]) -> Iterator[Difference]:
        names = self._names
        pairs = [(i, j) for i in range(len(names)) for j in range(i)]
        if not pairs:
            return
        contrasts = torch.zeros(len(pairs), len(names) + 1, dtype=torch.float64)
        for row, (column, other) in enumerate(pairs):
            contrasts[row, column], contrasts[row, other] = 1, -1
        figures = self._by_layer(contrasts, replicates)
        depths = _rows(*self._mean_depth.estimates(contrasts))[0]
        for row, (column, other) in enumerate(pairs):
            for layer in (*range(self._n_layers), None):
                for metric, found in figures.items():
                    estimate = found[-1 if layer is None else layer][row]
                    yield Difference(names[column], names[other], layer, metric, *estimate)
            depth = depths[row]
            yield Difference(names[column], names[other], None, "mean_prediction_depth", *depth)

    def _by_layer(
        self, contrasts: Float[Tensor, "figures columns"], replicates: dict[str, Tensor]
    ) -> dict[str, list[list[Estimate]]]:
        """By metric: for every layer and last their mean, the figure of each contrast."""
        values, errors = self._per_token.estimates(contrasts)
        found = {
            metric: _rows(*pair)
            for metric, *pair in zip(self._metrics, values, errors, strict=True)
        }
        found["bits_per_byte"] = _rows(*self._bits.estimates(contrasts))
        found["kl_nats_position_0"] = _rows(*self._first.estimates(contrasts))
        for metric, parts in replicates.items():
            found[metric] = _rows(*jackknife(parts @ contrasts.mT))
        return found

    def _replicates(self) -> dict[str, Float[Tensor, "replicates layers columns"]]:
        """Of the figures that are no ratio, by metric."""
        used = [group for group, count in enumerate(self._group_tokens.sums.tolist()) if count]
        found = {"bias_nats": self._distributions.replicates(_bias, used)}
        if self._calibration is not None:
            found["calibration_error"] = self._calibration.replicates(_gap, used)
        by_layer = {metric: parts[:, self._rows].mT for metric, parts in found.items()}
        return {
            metric: torch.cat([parts, parts.mean(1, keepdim=True)], 1)
            for metric, parts in by_layer.items()
        }

    def _position_grids(self) -> dict[str, dict[str, Grid]]:
        if self._positions is None or self._position_bits is None:
            return {}
        figures, bits = self._positions.estimates(), self._position_bits.estimates()
        grids: dict[str, dict[str, Grid]] = {}
        for column, lens in enumerate([*self._names, MODEL]):
            layers = 1 if lens == MODEL else self._n_layers
            grids[lens] = {
                metric: _grid(*(part[index, :layers, :, column] for part in figures))
                for index, metric in enumerate(self._metrics)
                if lens != MODEL or METRICS[metric].of_model
            }
            grids[lens]["bits_per_byte"] = _grid(*(part[:layers, :, column] for part in bits))
        return grids

    def _transfer_grids(self) -> dict[str, dict[str, Grid]]:
        figures = self._transfer.estimates()
        return {
            lens: {
                metric: _grid(*(part[index, ..., column] for part in figures))
                for index, metric in enumerate(OF_TRANSFER)
            }
            for column, lens in enumerate(self._transferred)
        }


def _bias(sums: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """KL of the model's mean distribution, the last row, to each row's, in nats."""
    means = sums / sums.sum(-1, keepdim=True)
    # A token to which a lens gives less than a float can hold has at least the least of them.
    nats = means[-1].log() - means.clamp_min(torch.finfo(torch.float32).tiny).log()
    return torch.where(means[-1] > 0, means[-1] * nats, 0.0).sum(-1)


def _gap(sums: Float[Tensor, "rows bins 3"]) -> Float[Tensor, " rows"]:
    """Expected calibration error: the gap of every bin, weighted by its tokens.

    Source:
        Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    confidence, correct, tokens = sums.unbind(-1)
    return (confidence - correct).abs().sum(-1) / tokens.sum(-1)


def _rows(values: Float[Tensor, "..."], errors: Float[Tensor, "..."]) -> list[list[Estimate]]:
    """Estimates of the last dimension, for every place in the others."""
    found, width = to_estimates(values, errors), values.shape[-1]
    return [found[start : start + width] for start in range(0, len(found), max(1, width))]


def _grid(values: Float[Tensor, "rows columns"], errors: Float[Tensor, "rows columns"]) -> Grid:
    rows = [[[_number(x) for x in row] for row in part.tolist()] for part in (values, errors)]
    return Grid(*rows)


def _number(value: float) -> float | None:
    """To seven digits, as there are so many."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
