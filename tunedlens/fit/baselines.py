"""Lenses that ignore the state. Their KL gives the KL of other lenses a scale."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens.engine import Decoder, chunk_tokens
from tunedlens.errors import InputError
from tunedlens.lenses import ConstantLens
from tunedlens.model import FrozenModel

_BLOCKS_AT_A_TIME = 8


def unigram_lens(
    model: FrozenModel, blocks: Iterable[Int[Tensor, " seq"]], tokens: int
) -> ConstantLens:
    """The token frequencies of a text, with one added to every count.

    Args:
        model: the model whose vocabulary is counted.
        tokens: the maximum number of tokens to count, from the start of the text.

    Raises:
        InputError: the text is empty.
    """
    vocab_size = model.identity.vocab_size
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for block in _first(blocks, tokens):
        counts += torch.bincount(block, minlength=vocab_size)
    _require_text(counts)
    return _constant((counts + 1) / (counts + 1).sum(), model)


@torch.no_grad()
def mean_lens(
    model: FrozenModel, blocks: Iterable[Int[Tensor, " seq"]], tokens: int
) -> ConstantLens:
    """The model's own distribution, averaged over the positions of a text.

    Args:
        tokens: the maximum number of positions, from the start of the text.

    Raises:
        InputError: the text is empty.
    """
    vocab_size = model.identity.vocab_size
    sums = torch.zeros(vocab_size, dtype=torch.float64)
    chunk = chunk_tokens(vocab_size, model.device)
    decoder = Decoder(model.unembedding.centred())
    batch: list[Tensor] = []

    def flush() -> None:
        final = model.residual_stream(torch.stack(batch).to(model.device))[-1].flatten(0, 1)
        for part in final.split(chunk):
            sums.add_(decoder.model_logits(part).softmax(-1).sum(0).double().cpu())
        batch.clear()

    for block in _first(blocks, tokens):
        if batch and (len(batch) == _BLOCKS_AT_A_TIME or len(block) != len(batch[0])):
            flush()
        batch.append(block)
    if batch:
        flush()
    _require_text(sums)
    return _constant(sums / sums.sum(), model)


def _first(blocks: Iterable[Int[Tensor, " seq"]], tokens: int) -> Iterator[Int[Tensor, " seq"]]:
    for block in blocks:
        if tokens <= 0:
            return
        yield block[:tokens]
        tokens -= len(block)


def _require_text(sums: Tensor) -> None:
    if not sums.sum():
        raise InputError("a baseline needs text with at least one token; got none")


def _constant(probs: Tensor, model: FrozenModel) -> ConstantLens:
    # A probability that underflows in float32 is raised to the smallest normal number.
    least = torch.finfo(torch.float32).tiny
    return ConstantLens(probs.clamp_min(least).log(), model.identity).to(model.device)
