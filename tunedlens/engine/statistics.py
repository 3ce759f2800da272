"""Statistics of a lens's distributions, compared with the model's and with the true next tokens.

Evaluation, trajectories and comparisons take all their values from here.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.engine import distributions
from tunedlens.lenses import ResidualLens
from tunedlens.model import Unembedding

OverVocab = Float[Tensor, "tokens vocab"]
PerToken = Float[Tensor, " tokens"]
Ids = Int[Tensor, " tokens"]
_CACHED_LOGITS = 2**20
"""A few arrays of this many logits fit into the cache of a CPU."""


class ModelDistribution(NamedTuple):
    """The model's distribution at some tokens, computed once for all lenses and layers."""

    probs: OverVocab
    log_probs: OverVocab
    negative_entropy: PerToken
    top1_ids: Ids

    @classmethod
    def from_logits(cls, logits: OverVocab) -> Self:
        """From logits, which may differ from the model's by a constant per token."""
        log_probs = distributions.log_probs(logits)
        probs = log_probs.exp()
        negative_entropy = torch.linalg.vecdot(probs, log_probs)
        return cls(probs, log_probs, negative_entropy, log_probs.argmax(-1))


class LensStatistics:
    """Statistics of a lens's distributions, each computed when it is first used.

    The largest logit of every token is shifted to 0. Then log Z is minus the logarithm of the
    largest probability, and KL, entropy and cross-entropy are log Z and one inner product or
    less.

    Args:
        logits: the logits of the lens, up to a constant per token. They are shifted in place.
        model: the model's distribution at the same tokens.
        next_ids: the true next tokens. Where there is none, pass any id and ignore the values
            that depend on it.
    """

    def __init__(self, logits: OverVocab, model: ModelDistribution, next_ids: Ids) -> None:
        self._largest = logits.amax(-1)
        self._logits = logits.sub_(self._largest[:, None])
        self._model, self._next_ids = model, next_ids

    @cached_property
    def probs(self) -> OverVocab:
        return self._logits.softmax(-1)

    @cached_property
    def _log_z(self) -> PerToken:
        return -self.confidence.log()

    @property
    def log_sum_exp(self) -> PerToken:
        """Log Σ exp(logit): added to a log-probability, it gives the logit."""
        return self._largest + self._log_z

    @cached_property
    def log_probs(self) -> OverVocab:
        return self._logits - self._log_z[:, None]

    def log_prob(self, ids: Int[Tensor, "tokens n"]) -> Float[Tensor, "tokens n"]:
        """Log-probabilities of chosen tokens, in nats."""
        return self._logits.gather(-1, ids) - self._log_z[:, None]

    def rank(self, ids: Ids) -> Ids:
        """Ranks of chosen tokens from 1; see `distributions.rank`."""
        return distributions.rank(self._logits, ids)

    def ranks(self, ids: Int[Tensor, "tokens n"]) -> Int[Tensor, "tokens n"]:
        """Ranks of several tokens at every position, from 1."""
        return distributions.ranks(self._logits, ids)

    def top_k(self, k: int) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        """The ids of the k most probable tokens and their log-probabilities in nats."""
        top = self._logits.topk(k, -1)
        return top.indices, top.values - self._log_z[:, None]

    # The metrics of a token, under the names of `tunedlens.metrics.METRICS`.

    @property
    def kl_nats(self) -> PerToken:
        expected = torch.linalg.vecdot(self._model.probs, self._logits)
        return self._model.negative_entropy - expected + self._log_z

    @property
    def cross_entropy_nats(self) -> PerToken:
        return self._log_z - self._next_logits

    @property
    def entropy_nats(self) -> PerToken:
        return self._log_z - torch.linalg.vecdot(self.probs, self._logits)

    @property
    def top1_agreement(self) -> PerToken:
        return (self._model_top1_rank == 1).float()

    @property
    def top10_agreement(self) -> PerToken:
        return (self._model_top1_rank <= 10).float()

    @property
    def accuracy(self) -> PerToken:
        is_model_top1 = self._next_ids == self._model.top1_ids
        is_correct = is_model_top1 & (self._model_top1_rank == 1)
        # Few other tokens have the largest logit, so only these few are ranked.
        others = ~is_model_top1 & (self._next_logits == 0)
        if others.any():
            ranks = distributions.rank(self._logits[others], self._next_ids[others])
            is_correct[others] = ranks == 1
        return is_correct.float()

    @property
    def reverse_kl_nats(self) -> PerToken:
        return distributions.expectation(self.probs, self.log_probs - self._model.log_probs)

    @property
    def js_nats(self) -> PerToken:
        return distributions.js_divergence(self.log_probs, self._model.log_probs)

    @property
    def reciprocal_rank(self) -> PerToken:
        return 1 / self.rank(self._next_ids).float()

    @property
    def model_top1_rank(self) -> PerToken:
        return self._model_top1_rank.float()

    @cached_property
    def confidence(self) -> PerToken:
        return self.probs.amax(-1)

    @property
    def top1_id(self) -> PerToken:
        """The id of the most probable token, which a float32 holds exactly up to 2^24."""
        return self._logits.argmax(-1).float()

    @cached_property
    def _next_logits(self) -> PerToken:
        return self._logits.gather(-1, self._next_ids[:, None])[:, 0]

    @cached_property
    def _model_top1_rank(self) -> Ids:
        return self.rank(self._model.top1_ids)


@torch.no_grad()
def kl_by_layer(
    lens: ResidualLens, unembedding: Unembedding, states: Sequence[Tensor], shift: int = 0
) -> dict[int, float]:
    """Mean KL(model ‖ lens) of a short text by layer, in nats, with all logits in memory.

    Args:
        unembedding: the unembedding of the model.
        states: all states of the residual stream, the last one before the final norm.
        shift: added to the layer to choose another translator for its state. Layers without
            one are left out.
    """
    *states, final = states
    model, n_layers = distributions.log_probs(unembedding(final)), len(states)
    return {
        layer: float(
            distributions.kl_divergence(
                model, distributions.log_probs(lens(states[layer], layer + shift))
            ).mean()
        )
        for layer in range(max(0, -shift), n_layers - max(0, shift))
        if lens.reads("resid_pre", layer + shift)
    }


def measure(
    metrics: Sequence[str], logits: OverVocab, model: ModelDistribution, next_ids: Ids
) -> Float[Tensor, "metrics tokens"]:
    """Metrics of every token, by their names in `LensStatistics`.

    The logits are overwritten with the probabilities. On a CPU the tokens are processed a few at
    a time, so that they stay in the cache from one pass over the vocabulary to the next.
    """
    on_cpu = logits.device.type == "cpu"
    count = max(1, _CACHED_LOGITS // logits.shape[1]) if on_cpu else len(logits)
    parts = []
    for start in range(0, len(logits), count):
        tokens = slice(start, start + count)
        part = ModelDistribution(*(value[tokens] for value in model))
        statistics = LensStatistics(logits[tokens], part, next_ids[tokens])
        parts.append(torch.stack([getattr(statistics, metric) for metric in metrics]))
        logits[tokens] = statistics.probs
    return torch.cat(parts, 1)
