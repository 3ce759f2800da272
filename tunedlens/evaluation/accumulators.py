"""Sums over the blocks seen so far, one class for each kind of result.

Arrays by layer have n + 1 entries: layers 0 to n - 1, and last their mean.
"""

import math
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.evaluation.batches import TRANSFER_METRICS, Layout, ScoredBatch
from tunedlens.evaluation.estimates import Estimates, GroupSums, RatioSums, jackknife

BINS = 15
"""Bins of confidence, of equal width."""


class Accumulator(Protocol):
    """Sums over blocks of what one kind of result needs."""

    @property
    def sums(self) -> RatioSums | GroupSums:
        """All that it holds, so that processes can add their sums up."""

    def add(self, batch: ScoredBatch) -> None:
        """Add the blocks of a batch."""


class ByLayer(Accumulator, Protocol):
    """Accumulates metrics that every lens has at every layer."""

    def estimates(self, contrasts: Float[Tensor, "contrasts columns"]) -> dict[str, Estimates]:
        """Estimates of shape [layers + 1, contrasts], by metric."""


class Ratios:
    """Totals divided by counts: per-token metrics, bits per byte, KL at position 0."""

    def __init__(self, layout: Layout, metrics: tuple[str, ...]) -> None:
        n_layers, columns = layout.rows.shape
        self._metrics = (*metrics, "bits_per_byte", "kl_nats_position_0")
        self.sums = RatioSums(len(self._metrics), n_layers + 1, columns=columns)

    def add(self, batch: ScoredBatch) -> None:
        totals = {metric: values.sum(-1) for metric, values in batch.values.items()}
        totals["bits_per_byte"] = totals["cross_entropy_nats"] / math.log(2)
        totals["kl_nats_position_0"] = batch.values["kl_nats"][..., 0]
        counts = dict.fromkeys(totals, batch.is_scored.sum(-1))
        counts["bits_per_byte"] = batch.text_bytes.sum(-1)
        counts["kl_nats_position_0"] = batch.is_scored[:, 0]
        by_layer = torch.stack([totals[metric] for metric in self._metrics])
        denominators = torch.stack([counts[metric] for metric in self._metrics])
        self.sums.add(_with_mean(by_layer, dim=1), denominators[:, None])

    def estimates(self, contrasts: Float[Tensor, "contrasts columns"]) -> dict[str, Estimates]:
        parts = zip(*self.sums.estimates(contrasts), strict=True)
        return {metric: Estimates(*part) for metric, part in zip(self._metrics, parts, strict=True)}

    @property
    def tokens(self) -> int:
        """Scored positions."""
        return self._total("kl_nats")

    @property
    def text_bytes(self) -> int:
        """Bytes of text that the predicted tokens stand for."""
        return self._total("bits_per_byte")

    @property
    def blocks(self) -> int:
        """Blocks with a scored position."""
        return round(float(self.sums.blocks[0, 0]))

    def _total(self, metric: str) -> int:
        return round(float(self.sums.denominator[self._metrics.index(metric), 0]))


class Bias:
    """The KL between the mean distributions of model and lens, from sums of probabilities."""

    def __init__(self, layout: Layout, vocab_size: int, device: torch.device) -> None:
        self._rows = layout.rows
        self.sums = GroupSums(layout.n_rows, vocab_size, device=device)

    def add(self, batch: ScoredBatch) -> None:
        groups = batch.groups.unique().to(self.sums.sums.device)
        self.sums.sums.index_add_(0, groups, batch.probability_sums)

    def estimates(self, contrasts: Float[Tensor, "contrasts columns"]) -> dict[str, Estimates]:
        by_layer = self.sums.replicates(_bias_nats)[:, self._rows]
        return {"bias_nats": jackknife(_with_mean(by_layer, dim=1) @ contrasts.mT)}


class Calibration:
    """The expected calibration error, from confidence and accuracy by bin of confidence.

    Source:
        Guo et al. 2017, arXiv:1706.04599, section 2.
    """

    def __init__(self, layout: Layout) -> None:
        self.sums = GroupSums(*layout.rows.shape, BINS, 3)

    def add(self, batch: ScoredBatch) -> None:
        confidence, correct = batch.values["confidence"], batch.values["accuracy"]
        count = batch.is_scored.double().expand_as(correct)
        # A confidence that is NaN is reported as such elsewhere.
        bins = (confidence.nan_to_num() * BINS).long().clamp(0, BINS - 1)
        layers, columns = (torch.arange(n) for n in bins.shape[:2])
        index = (
            batch.groups[:, None],
            layers[:, None, None, None],
            columns[:, None, None],
            bins,
        )
        sums = torch.stack([confidence, correct, count], -1)
        self.sums.sums.index_put_(index, sums, accumulate=True)

    def estimates(self, contrasts: Float[Tensor, "contrasts columns"]) -> dict[str, Estimates]:
        by_layer = self.sums.replicates(_calibration_error)
        return {"calibration_error": jackknife(_with_mean(by_layer, dim=1) @ contrasts.mT)}


class PredictionDepth:
    """The first layer from which the most probable token no longer changes, up to n.

    From there on it is the model's most probable token.
    """

    def __init__(self, layout: Layout) -> None:
        self._n_layers, columns = layout.rows.shape
        self.sums = RatioSums(self._n_layers + 2, columns=columns)

    def add(self, batch: ScoredBatch) -> None:
        agrees = batch.values["top1_agreement"] > 0
        depth = self._n_layers - agrees.flip(0).long().cumprod(0).sum(0)
        has_depth = torch.arange(self._n_layers + 1)[:, None, None, None] == depth
        numerators = torch.cat([has_depth, depth[None]]) * batch.is_scored
        self.sums.add(numerators.sum(-1), batch.is_scored.sum(-1))

    def fractions(self) -> Estimates:
        """Fractions of tokens by depth, of shape [layers + 1, columns]."""
        return Estimates(*(part[:-1] for part in self.sums.estimates()))

    def mean(self, contrasts: Float[Tensor, "contrasts columns"]) -> Estimates:
        """The mean depth of every contrast."""
        return Estimates(*(part[-1] for part in self.sums.estimates(contrasts)))


class ByPosition:
    """Per-token metrics and bits per byte at every position in the block."""

    def __init__(self, layout: Layout, metrics: tuple[str, ...], positions: int) -> None:
        n_layers, columns = layout.rows.shape
        self.metrics = (*metrics, "bits_per_byte")
        self.sums = RatioSums(len(self.metrics), n_layers, positions, columns=columns)

    def add(self, batch: ScoredBatch) -> None:
        values = batch.values | {"bits_per_byte": batch.values["cross_entropy_nats"] / math.log(2)}
        counts = dict.fromkeys(values, batch.is_scored.T)
        counts["bits_per_byte"] = batch.text_bytes.T
        numerators = torch.stack([values[metric] for metric in self.metrics]).movedim(-1, 2)
        denominators = torch.stack([counts[metric] for metric in self.metrics])
        self.sums.add(numerators, denominators[:, None])

    def estimates(self) -> Estimates:
        """Estimates of shape [metrics, layers, positions, columns]."""
        return self.sums.estimates()


class Transfer:
    """`TRANSFER_METRICS` of every layer's translator at every layer."""

    def __init__(self, layout: Layout) -> None:
        n_layers, columns = len(layout.rows), len(layout.transfer_lenses)
        self.sums = RatioSums(len(TRANSFER_METRICS), n_layers, n_layers, columns=columns)

    def add(self, batch: ScoredBatch) -> None:
        self.sums.add(batch.transfer, batch.is_scored.sum(-1))

    def estimates(self) -> Estimates:
        """Estimates of shape [metrics, translators, layers, lenses]."""
        return self.sums.estimates()


def _with_mean(values: Tensor, dim: int) -> Tensor:
    """The values by layer, and last the mean over layers."""
    return torch.cat([values, values.mean(dim, keepdim=True)], dim)


def _bias_nats(sums: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """KL of the model's mean distribution, in the last row, to each row's."""
    means = sums / sums.sum(-1, keepdim=True)
    # A probability below the smallest normal float counts as that.
    nats = means[-1].log() - means.clamp_min(torch.finfo(torch.float32).tiny).log()
    return torch.where(means[-1] > 0, means[-1] * nats, 0.0).sum(-1)


def _calibration_error(
    sums: Float[Tensor, "layers columns bins 3"],
) -> Float[Tensor, "layers columns"]:
    confidence, correct, tokens = sums.unbind(-1)
    return (confidence - correct).abs().sum(-1) / tokens.sum(-1)
