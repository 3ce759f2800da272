"""Stimulus-response alignment: how similarly a lens and the model change under an ablation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.causal.ablation import Mode
from tunedlens.causal.interventions import Intervention, interventions, mean_over_positions
from tunedlens.causal.targets import Target
from tunedlens.engine import chunk_tokens
from tunedlens.evaluation import Estimate
from tunedlens.lenses import Lens, require_made_for
from tunedlens.model import FrozenModel

if TYPE_CHECKING:
    from pandas import DataFrame

OverVocab = Float[Tensor, "*positions vocab"]


class Alignment(NamedTuple):
    """The similarity of the responses of a lens and of the model to the ablation of one target."""

    lens: str
    site: str
    layer: int
    """The layer that the lens reads."""
    similarity: Estimate
    """Mean cosine similarity over positions, with its error clustered by sequence."""


@torch.no_grad()
def response_alignment(
    model: FrozenModel,
    lenses: Mapping[str, Lens],
    input_ids: Int[Tensor, "batch seq"],
    targets: Sequence[Target],
    mode: Mode = "resample",
    *,
    seed: int = 0,
    skip_first: int = 0,
) -> list[Alignment]:
    """Compare how the outputs of a lens and of the model change under the same ablation.

    The stimulus is the change of the lens's logits, and the response is the change of the model's
    logits. Their similarity is the cosine in Aitchison geometry, weighted by the model's
    distribution without ablation. In the paper, a target is the span of the first ten vectors of a
    lens's causal basis at one layer, and the mode is `resample`.

    Args:
        lenses: the lenses by name, which all read the same states.
        input_ids: token ids; all sequences run together.
        targets: each target is ablated as a whole, such as all directions of one `Directions`.
        mode, seed, skip_first: as in `ablated`.

    Returns:
        An `Alignment` for every target and lens.

    Raises:
        InputError: a lens was made for another model or does not read such a state, or as
            `ablated`.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 4.2.
    """
    require_made_for(model, lenses)
    found = []
    for run in interventions(model, input_ids, targets, mode, seed=seed, skip_first=skip_first):
        for name, lens in lenses.items():
            similarity = mean_over_positions(_similarities(model, lens, run))
            found.append(Alignment(name, run.point.site, run.point.layer, similarity))
    return found


def alignment_table(alignments: Sequence[Alignment]) -> "DataFrame":
    """A table with one row per lens and target."""
    import pandas as pd

    lines = [(*one[:3], one.similarity.value, one.similarity.standard_error) for one in alignments]
    return pd.DataFrame(lines, columns=["lens", "site", "layer", "similarity", "standard_error"])


def aitchison_similarity(one: OverVocab, other: OverVocab, weights: OverVocab) -> Tensor:
    """Cosine similarity of two changes of log-probabilities in weighted Aitchison geometry.

    With weights w, which sum to 1, the inner product of x and y is Σ w x̃ ỹ, where x̃ = x − Σ w x.
    It does not change if a constant is added to x or y, which a softmax ignores. The similarity is
    0 where one of the two changes is 0.

    Source:
        Egozcue and Pawlowsky-Glahn 2016, "Changing the reference measure in the simplex and its
        weighting effects".
    """
    one, other = (x - (weights * x).sum(-1, keepdim=True) for x in (one, other))
    product = (weights * one * other).sum(-1)
    squares = [(weights * x.square()).sum(-1) for x in (one, other)]
    return product / (squares[0] * squares[1]).sqrt().clamp(min=torch.finfo(product.dtype).tiny)


def _similarities(model: FrozenModel, lens: Lens, run: Intervention) -> Float[Tensor, "batch seq"]:
    """The similarity at every position."""
    states = [state.flatten(0, 1) for state in run[2:]]
    size = chunk_tokens(model.identity.vocab_size, model.device)
    similarities = []
    for before, after, final_before, final_after in zip(
        *(state.split(size) for state in states), strict=True
    ):
        stimulus = lens(after, run.point.layer, run.point.site) - lens(
            before, run.point.layer, run.point.site
        )
        clean = model.unembedding(final_before)
        response = model.unembedding(final_after) - clean
        similarities.append(aitchison_similarity(stimulus, response, clean.softmax(-1)))
    return torch.cat(similarities).view(run.before.shape[:2])
