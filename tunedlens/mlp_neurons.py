"""The neurons of an MLP: how active they are, and the tokens that they promote."""

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
    """The most active neurons of a block's MLP at one position.

    A neuron adds its coefficient (its activation) times its output vector to the residual
    stream. It promotes the tokens whose logits this raises most. The logits are computed with
    the unembedding alone, without the final norm, because the scale of the norm depends on the
    whole stream.

    Args:
        model: the model.
        text: the text.
        layer: the block.
        position: an index in the text.
        k: the number of neurons, which have the largest absolute coefficients.
        promoted: the number of promoted tokens per neuron.

    Returns:
        A line per neuron: its coefficient, and the promoted tokens by rank with the increase of
        their logits beyond the mean increase of all tokens.

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
    if not -n_layers <= layer < n_layers:
        raise InputError(f"layer must be between {-n_layers} and {n_layers - 1}, got {layer}")
    if not -count <= position < count:
        raise InputError(f"position must be between {-count} and {count - 1}, got {position}")
    coefficients, vectors = model.mlp_neurons(ids, layer % n_layers)
    here = coefficients[0, position].float()
    if not 1 <= k <= len(here):
        raise InputError(f"k must be between 1 and {len(here)}, the MLP's neurons; got {k}")
    if not 1 <= promoted <= model.identity.vocab_size:
        raise InputError(
            f"promoted must be between 1 and {model.identity.vocab_size}, got {promoted}"
        )
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
    ranks = pd.MultiIndex.from_product([range(1, promoted + 1), ["token", "logit"]])
    return pd.DataFrame(
        lines,
        index=pd.Index(chosen.tolist(), name="neuron"),
        columns=ranks.insert(0, ("coefficient", "")),
    )
