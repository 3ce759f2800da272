"""Neurons of an MLP: their coefficients, and the tokens that they promote."""

from typing import TYPE_CHECKING

import torch

from tunedlens.errors import InputError
from tunedlens.model import FrozenModel
from tunedlens.tokenizer import shown

if TYPE_CHECKING:
    from pandas import DataFrame


@torch.no_grad()
def neurons(
    model: FrozenModel, text: str, layer: int, position: int = -1, *, k: int = 10, promoted: int = 5
) -> "DataFrame":
    """The neurons of a block's MLP with the largest absolute coefficients at one position.

    A neuron adds its coefficient (activation) times its output vector to the residual stream. The
    tokens that it promotes are those whose logits this increases most. The logits are decoded
    with the unembedding only, without the final norm, whose scale depends on the text.

    Args:
        k: the number of neurons.
        promoted: the number of promoted tokens of each neuron.

    Returns:
        A table with one row per neuron: its coefficient, and the tokens that it promotes in
        descending order, each with the logit that the neuron adds minus the mean over the
        vocabulary.

    Raises:
        InputError: there is no such layer or position, the text cannot be read, or the MLP
            is not a sum over neurons.

    Source:
        Geva et al. 2022, "Transformer Feed-Forward Layers Build Predictions by Promoting
        Concepts in the Vocabulary Space", arXiv:2203.14680.
    """
    import pandas as pd

    ids = model.encode(text)
    count, n_layers = ids.shape[1], model.identity.n_layers
    _require_between("layer", layer, -n_layers, n_layers - 1)
    _require_between("position", position, -count, count - 1)
    coefficients, vectors = model.mlp_neurons(ids, layer % n_layers)
    here = coefficients[0, position].float()
    _require_between("k", k, 1, len(here))
    _require_between("promoted", promoted, 1, model.identity.vocab_size)
    chosen = here.abs().topk(k).indices
    added = here[chosen, None] * vectors[chosen].float()
    logits = added @ model.unembedding.weight.float().mT
    best = (logits - logits.mean(-1, keepdim=True)).topk(promoted)
    lines = []
    for neuron, tokens, gains in zip(
        chosen.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
    ):
        words = [shown(model.tokenizer, token) for token in tokens]
        pairs = [value for pair in zip(words, gains, strict=True) for value in pair]
        lines.append([here[neuron].item(), *pairs])
    places = pd.MultiIndex.from_product([range(1, promoted + 1), ["token", "logit"]])
    return pd.DataFrame(
        lines,
        index=pd.Index(chosen.tolist(), name="neuron"),
        columns=places.insert(0, ("coefficient", "")),
    )


def _require_between(name: str, value: int, least: int, largest: int) -> None:
    if not least <= value <= largest:
        raise InputError(f"{name} must be between {least} and {largest}, got {value}")
