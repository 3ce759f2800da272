"""The tokens that a lens predicts too often: its mean distribution compared with the model's."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.config import ScoringConfig
from tunedlens.devices import float32_products
from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import Estimate, GroupSums
from tunedlens.evaluation.pipeline import numbered_blocks
from tunedlens.evaluation.scoring import Layout, Scorer
from tunedlens.evaluation.tally import bias_nats
from tunedlens.lenses import Lens, require_made_for
from tunedlens.model import FrozenModel
from tunedlens.tokenizer import TokenText, token_text


@dataclass(frozen=True)
class TokenMean:
    """The mean probability of one token over a text."""

    token_id: int
    token: TokenText
    lens: float
    model: float


@dataclass(frozen=True)
class LayerBias:
    """The mean distribution of a lens at one layer, compared with the model's."""

    layer: int
    bias_nats: Estimate
    """KL from the model's mean distribution to the lens's."""
    excess: float
    """Half the sum of absolute differences (total variation) of both mean distributions."""
    over: list[TokenMean]
    """The tokens with the largest difference, lens minus model."""
    under: list[TokenMean]
    """The tokens with the largest difference, model minus lens."""


@dataclass(frozen=True)
class TokenBias:
    """Mean distributions of lenses and of the model over a text."""

    table: ClassVar[Callable[..., str]]
    """See `tunedlens.report.token_bias`."""

    tokens: int
    lenses: dict[str, list[LayerBias]]
    """By name, in ascending order of layers."""


@float32_products()
def token_bias(
    model: FrozenModel,
    lenses: Mapping[str, Lens],
    blocks: Iterable[Int[Tensor, " seq"]],
    config: ScoringConfig | None = None,
    *,
    k: int = 5,
) -> TokenBias:
    """Find the tokens that each lens predicts too often or too rarely, on average over a text.

    Args:
        lenses: the lenses by name.
        blocks: token ids, in blocks of equal length.
        config: the largest number of positions, and the batch size.
        k: the number of tokens to keep that are predicted too often, and that are predicted too
            rarely.

    Raises:
        InputError: there is nothing to score, blocks differ in length, a lens belongs to another
            model, or k is out of range.
    """
    require_made_for(model, lenses)
    vocab_size = model.identity.vocab_size
    if not 1 <= k <= vocab_size:
        raise InputError(f"k must be between 1 and {vocab_size}, got {k}")
    config = config or ScoringConfig()
    layout = Layout.of(model, lenses, transfer=False)
    scorer = Scorer(model, layout, ("entropy_nats",))
    sums = GroupSums(len(layout.decodings), vocab_size, device=layout.sums_device)
    numbered, tokens = numbered_blocks(blocks, config.tokens, lambda _: None), 0
    while batch := list(islice(numbered, config.batch_size)):
        scored = scorer.score(batch)
        sums.sums.index_add_(
            0, scored.groups.unique().to(sums.sums.device), scored.probability_sums
        )
        tokens += int(scored.is_scored.sum())
    if not tokens:
        raise InputError("there is nothing to score: no block has two tokens; give more text")
    means, kl = sums.sums.sum(0).cpu() / tokens, sums.jackknife(bias_nats)
    found = {}
    for column, (name, layers) in enumerate(zip(layout.columns, layout.layers, strict=True)):
        rows = [(layer, int(layout.rows[layer, column])) for layer in layers]
        found[name] = [
            _layer_bias(model, layer, kl.at(row), means[row], means[-1], k) for layer, row in rows
        ]
    return TokenBias(tokens, found)


def _layer_bias(
    model: FrozenModel,
    layer: int,
    kl: Estimate,
    lens_mean: Float[Tensor, " vocab"],
    model_mean: Float[Tensor, " vocab"],
    k: int,
) -> LayerBias:
    difference = lens_mean - model_mean

    def top(values: Float[Tensor, " vocab"]) -> list[TokenMean]:
        return [
            TokenMean(i, token_text(model.tokenizer, i), float(lens_mean[i]), float(model_mean[i]))
            for i in values.topk(k).indices.tolist()
        ]

    excess = float(difference.abs().sum() / 2)
    return LayerBias(layer, kl, excess, over=top(difference), under=top(-difference))
