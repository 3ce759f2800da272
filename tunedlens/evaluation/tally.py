"""Sums of everything that is reported over the blocks seen so far, and the figures from them."""

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.evaluation.results import MODEL, Difference, Evaluation, Grid, Result
from tunedlens.frozen import ModelIdentity
from tunedlens.metrics import Estimate, GroupSums, RatioSums, jackknife, perplexity

_STANDARD = (
    "kl_nats",
    "cross_entropy_nats",
    "entropy_nats",
    "top1_agreement",
    "top10_agreement",
    "accuracy",
)
_EXTENDED = ("reverse_kl_nats", "js_nats", "reciprocal_rank", "model_top1_rank", "confidence")
PER_TOKEN = {False: _STANDARD, True: _STANDARD + _EXTENDED}
"""Figures of a position, standard or all."""

_KL, _CROSS_ENTROPY, _TOP1, _ACCURACY = (
    _STANDARD.index(name)
    for name in ("kl_nats", "cross_entropy_nats", "top1_agreement", "accuracy")
)
_OF_MODEL = {
    *("cross_entropy_nats", "perplexity", "bits_per_byte", "entropy_nats", "accuracy"),
    *("reciprocal_rank", "confidence", "calibration_error"),
}
"""Figures that the model has by itself."""

BINS = 15
"""Of confidence, all of one width."""


class Tally:
    """Adds up figures by block; its columns are the lenses and, last, the model itself.

    Args:
        names: of the lenses.
        rows: for every column, where the figures of each layer stand in what is added.
        model: the model.
        extended: whether all figures of a position are added.
        transferred: names of the lenses whose translators are used at every layer.
        device: where sums of whole distributions are kept.
    """

    def __init__(
        self,
        names: list[str],
        rows: list[list[int]],
        model: ModelIdentity,
        *,
        extended: bool,
        transferred: list[str],
        device: torch.device,
    ) -> None:
        self._names, self._rows, self._transferred = names, torch.tensor(rows), transferred
        self._n_layers, self._metrics, self._extended = (
            model.n_layers,
            PER_TOKEN[extended],
            extended,
        )
        n_layers, columns, n_rows = model.n_layers, len(names) + 1, int(self._rows.max()) + 1
        self._per_token = RatioSums(len(self._metrics), n_layers, columns=columns)
        self._bits = RatioSums(n_layers, columns=columns)
        self._first = RatioSums(n_layers, columns=columns)
        self._depth = RatioSums(n_layers + 1, columns=columns)
        self._mean_depth = RatioSums(columns=columns)
        self._group_tokens = GroupSums()
        # Apple's GPUs have no float64.
        where = "cpu" if device.type == "mps" else device
        self.distributions = GroupSums(n_rows, model.vocab_size, device=where)
        """Of probabilities, by row."""
        self._calibration = GroupSums(n_rows, BINS, 3)
        self._transfer = RatioSums(2, n_layers, n_layers, columns=max(1, len(transferred)))
        self._positions: tuple[RatioSums, RatioSums] | None = None

    def watch_positions(self, count: int) -> None:
        """Keep sums for every position in the block as well."""
        if self._positions is None:
            shape, columns = (self._n_layers, count), len(self._names) + 1
            self._positions = (
                RatioSums(len(self._metrics), *shape, columns=columns),
                RatioSums(*shape, columns=columns),
            )

    def add(
        self,
        figures: Float[Tensor, "metrics rows batch positions"],
        scored: Bool[Tensor, "batch positions"],
        text_bytes: Int[Tensor, "batch positions"],
        groups: Int[Tensor, " batch"],
    ) -> None:
        """Count the figures of further blocks where they are scored."""
        counts, text_bytes = scored.sum(-1), text_bytes * scored
        full = (figures.double() * scored)[:, self._rows]
        # metrics, columns, layers, batch, positions: columns go before what is added up over.
        by_layer = full.transpose(1, 2)
        self._per_token.add(by_layer.sum(-1), counts)
        bits = by_layer[_CROSS_ENTROPY] / math.log(2)
        self._bits.add(bits.sum(-1), text_bytes.sum(-1))
        self._first.add(by_layer[_KL, ..., 0], scored[:, 0])
        self._group_tokens.sums.index_add_(0, groups, counts.double())
        self._add_depths(full[_TOP1] > 0, scored, counts)
        if self._extended:
            self._add_calibration(figures, scored, groups)
        if self._positions is not None:
            per_token, position_bits = self._positions
            # The longest block comes first; a shorter one leaves its last positions alone.
            missing = per_token.moments.shape[2] - scored.shape[1]
            by_position = torch.nn.functional.pad(by_layer, (0, missing)).movedim(-1, 2)
            there = torch.nn.functional.pad(scored, (0, missing)).T
            bytes_there = torch.nn.functional.pad(text_bytes, (0, missing)).T
            per_token.add(by_position, there)
            position_bits.add(by_position[_CROSS_ENTROPY] / math.log(2), bytes_there)

    def _add_depths(
        self,
        agree: Bool[Tensor, "columns layers batch positions"],
        scored: Bool[Tensor, "batch positions"],
        counts: Int[Tensor, " batch"],
    ) -> None:
        # Where the best token no longer changes it is the model's.
        unchanged = agree.flip(1).long().cumprod(1).sum(1)
        depth = self._n_layers - unchanged
        shares = torch.nn.functional.one_hot(depth, self._n_layers + 1) * scored[..., None]
        self._depth.add(shares.sum(2).movedim(-1, 0), counts)
        self._mean_depth.add((depth * scored).sum(-1), counts)

    def _add_calibration(
        self,
        figures: Float[Tensor, "metrics rows batch positions"],
        scored: Bool[Tensor, "batch positions"],
        groups: Int[Tensor, " batch"],
    ) -> None:
        confidence = figures[self._metrics.index("confidence")].double()
        correct = figures[_ACCURACY].double()
        values = torch.stack([confidence, correct, torch.ones_like(correct)], -1)
        values *= scored[..., None]
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        n_rows = len(bins)
        row = torch.arange(n_rows)[:, None, None]
        index = (groups[:, None] * n_rows + row) * BINS + bins
        flat = self._calibration.sums.view(-1, 3)
        flat.index_add_(0, index.flatten(), values.flatten(0, 2))

    def add_transfer(
        self,
        figures: Float[Tensor, "2 translators layers lenses batch positions"],
        scored: Bool[Tensor, "batch positions"],
    ) -> None:
        """Count KL and cross-entropy of every translator at every layer."""
        self._transfer.add((figures.double() * scored).sum(-1), scored.sum(-1))

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, in each of them."""
        ratios = [self._per_token, self._bits, self._first, self._depth, self._mean_depth]
        ratios += [self._transfer, *(self._positions or ())]
        for part in ratios:
            moments = part.moments.to(accelerator.device)
            part.moments = accelerator.reduce(moments, "sum").cpu()
        for group in (self._group_tokens, self.distributions, self._calibration):
            there = group.sums.device
            group.sums = accelerator.reduce(group.sums.to(accelerator.device), "sum").to(there)

    def evaluation(self, tokens_sha256: str | None) -> Evaluation:
        """The figures.

        Raises:
            InputError: there is nothing to score, or a figure is not finite.
        """
        tokens = float(self._mean_depth.denominator)
        text_bytes = float(self._bits.denominator[0])
        if not tokens or not text_bytes:
            raise InputError(
                f"there is nothing to score: {tokens:.0f} tokens for {text_bytes:.0f} bytes of "
                "text; give more text or --tokens, or a smaller --seq-len"
            )
        estimates = _Estimates(self)
        results = list(estimates.results())
        for result in results:
            if not math.isfinite(result.value):
                raise InputError(
                    f"{result.metric} of {result.lens} at layer {result.layer} is {result.value}; "
                    "where it is being trained, a smaller --lr may help"
                )
        return Evaluation(
            results=results,
            n_layers=self._n_layers,
            tokens=round(tokens),
            text_bytes=round(text_bytes),
            blocks=round(float(self._mean_depth.blocks)),
            tokens_sha256=tokens_sha256,
            differences=list(estimates.differences()),
            by_position=self._position_grids(),
            transfer=self._transfer_grids(),
        )

    def _position_grids(self) -> dict[str, dict[str, Grid]]:
        if self._positions is None:
            return {}
        per_token, bits = (part.estimates() for part in self._positions)
        grids: dict[str, dict[str, Grid]] = {}
        for column, lens in enumerate([*self._names, MODEL]):
            layers = 1 if lens == MODEL else self._n_layers
            grids[lens] = {
                metric: _grid(*(part[index, :layers, :, column] for part in per_token))
                for index, metric in enumerate(self._metrics)
                if lens != MODEL or metric in _OF_MODEL
            }
            grids[lens]["bits_per_byte"] = _grid(*(part[:layers, :, column] for part in bits))
        return grids

    def _transfer_grids(self) -> dict[str, dict[str, Grid]]:
        estimates = self._transfer.estimates()
        return {
            lens: {
                metric: _grid(*(part[index, ..., column] for part in estimates))
                for index, metric in enumerate(("kl_nats", "cross_entropy_nats"))
            }
            for column, lens in enumerate(self._transferred)
        }


class _Estimates:
    """Figures and differences from the sums of a tally."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        used = [group for group, count in enumerate(tally._group_tokens.sums.tolist()) if count]
        self._grouped = {"bias_nats": tally.distributions.replicates(_bias, used)}
        if tally._extended:
            self._grouped["calibration_error"] = tally._calibration.replicates(_gap, used)

    def results(self) -> Iterator[Result]:
        tally = self._tally
        for column, lens in enumerate([*tally._names, MODEL]):
            if lens == MODEL:
                for metric, estimate in self._layer(column, 0):
                    if metric in _OF_MODEL:
                        yield Result(lens, tally._n_layers, metric, *estimate)
                return
            for layer in range(tally._n_layers):
                for metric, estimate in self._layer(column, layer):
                    yield Result(lens, layer, metric, *estimate)
            for layer in range(tally._n_layers + 1):
                share = tally._depth.estimate(layer, column)
                yield Result(lens, layer, "prediction_depth", *share)
            yield Result(lens, None, "mean_prediction_depth", *tally._mean_depth.estimate(column))

    def differences(self) -> Iterator[Difference]:
        tally = self._tally
        for column, lens in enumerate(tally._names):
            for other_column, other in enumerate(tally._names[:column]):
                for layer in range(tally._n_layers):
                    for metric, sums, index in self._ratios(layer):
                        estimate = sums.difference(*index, column, other_column)
                        yield Difference(lens, other, layer, metric, *estimate)
                    for metric, replicates in self._grouped.items():
                        mine, others = (
                            replicates[:, tally._rows[c, layer]] for c in (column, other_column)
                        )
                        yield Difference(lens, other, layer, metric, *jackknife(mine - others))

    def _layer(self, column: int, layer: int) -> Iterator[tuple[str, Estimate]]:
        for metric, sums, index in self._ratios(layer):
            estimate = sums.estimate(*index, column)
            yield metric, estimate
            if metric == "cross_entropy_nats":
                yield "perplexity", perplexity(estimate)
        for metric, replicates in self._grouped.items():
            yield metric, jackknife(replicates[:, self._tally._rows[column, layer]])

    def _ratios(self, layer: int) -> Iterator[tuple[str, RatioSums, tuple[int, ...]]]:
        for index, metric in enumerate(self._tally._metrics):
            yield metric, self._tally._per_token, (index, layer)
        yield "bits_per_byte", self._tally._bits, (layer,)
        yield "kl_nats_position_0", self._tally._first, (layer,)


def _bias(sums: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """KL of the model's mean distribution, the last row, to each row's, in nats."""
    means = sums / sums.sum(-1, keepdim=True)
    model = means[-1]
    return torch.special.xlogy(model, model / means).sum(-1)


def _gap(sums: Float[Tensor, "rows bins 3"]) -> Float[Tensor, " rows"]:
    """Expected calibration error: the gap of every bin, weighted by its tokens.

    Source:
        Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    confidence, correct, tokens = sums.unbind(-1)
    return (confidence - correct).abs().sum(-1) / tokens.sum(-1)


def _grid(values: Float[Tensor, "rows columns"], errors: Float[Tensor, "rows columns"]) -> Grid:
    return Grid(
        *([[_number(x) for x in row] for row in part.tolist()] for part in (values, errors))
    )


def _number(value: float) -> float | None:
    """To seven digits, as there are so many."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
