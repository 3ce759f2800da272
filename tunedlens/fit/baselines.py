"""Lenses that ignore the state. Their KL gives the KL of other lenses a scale."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens.devices import float32_products
from tunedlens.engine import Decoder, chunk_tokens
from tunedlens.errors import InputError
from tunedlens.lenses import ConstantLens
from tunedlens.model import FrozenModel

Block = Int[Tensor, " seq"]
_BLOCKS_AT_A_TIME = 8


def unigram_lens(model: FrozenModel, blocks: Iterable[Block], tokens: int) -> ConstantLens:
    """The token frequencies of a text, with one added to every count.

    Args:
        model: the model whose vocabulary is counted.
        tokens: the maximum number of tokens to count, from the start of the text.

    Raises:
        InputError: the text is empty.
    """
    counts = torch.zeros(model.identity.vocab_size, dtype=torch.float64)
    for block in _first(blocks, tokens):
        counts += torch.bincount(block, minlength=len(counts))
    return _constant_lens(counts, model, added=1)


@float32_products()
@torch.no_grad()
def mean_lens(model: FrozenModel, blocks: Iterable[Block], tokens: int) -> ConstantLens:
    """The model's own distribution, averaged over the positions of a text.

    Args:
        tokens: the maximum number of positions, from the start of the text.

    Raises:
        InputError: the text is empty.
    """
    sums = torch.zeros(model.identity.vocab_size, dtype=torch.float64)
    chunk, decoder = chunk_tokens(len(sums), model.device), Decoder(model.unembedding.centred())
    for _, same_length in groupby(_first(blocks, tokens), key=len):
        while batch := list(islice(same_length, _BLOCKS_AT_A_TIME)):
            final = model.residual_stream(torch.stack(batch).to(model.device))[-1]
            for part in final.flatten(0, 1).split(chunk):
                sums += decoder.model_logits(part).softmax(-1).sum(0).double().cpu()
    return _constant_lens(sums, model, added=0)


def _first(blocks: Iterable[Block], tokens: int) -> Iterator[Block]:
    for block in blocks:
        if tokens <= 0:
            return
        yield block[:tokens]
        tokens -= len(block)


def _constant_lens(sums: Tensor, model: FrozenModel, *, added: int) -> ConstantLens:
    """The constant lens with probabilities in proportion to `sums + added`."""
    if not sums.sum():
        raise InputError("a baseline needs text with at least one token; got none")
    probs = (sums + added) / (sums + added).sum()
    # A probability that underflows in float32 is raised to the smallest normal number.
    least = torch.finfo(torch.float32).tiny
    return ConstantLens(probs.clamp_min(least).log(), model.identity).to(model.device)
