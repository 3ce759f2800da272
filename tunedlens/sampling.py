"""Samples text from a model, for a model whose training text is not available."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from tunedlens.corpus import (
    LONGEST_DEFAULT_BLOCK,
    SELF,
    CorpusSplits,
    ResolvedCorpus,
    load_splits,
    split_ids,
)
from tunedlens.errors import InputError
from tunedlens.model import FrozenModel

_CPU_DOCUMENTS = 32
_MAX_GPU_DOCUMENTS = 512
"""Larger batches are hardly faster."""

Advance = Callable[[int], object]
"""Called with the number of tokens that were just sampled."""


def load_or_sample(
    config: ResolvedCorpus, model: FrozenModel, progress: Advance | None = None
) -> CorpusSplits:
    """Read a text, or sample it from the model if it is `self`, and split it.

    Raises:
        InputError: see `load_splits` and `sample_documents`.
    """
    if config.dataset != SELF:
        return load_splits(config, model.tokenizer)
    assert config.self_tokens is not None
    longest = max(config.seq_len, LONGEST_DEFAULT_BLOCK)
    if model.context is not None:
        longest = min(longest, model.context)
    documents = sample_documents(model, config.self_tokens, longest, progress)
    splits = split_ids(config, model.tokenizer, documents)
    for side in (splits.train, splits.validation):
        side.about["sampled"] = {
            "model": model.name,
            "tokens_at_least": config.self_tokens,
            "temperature": 1.0,
            "longest_document": longest - 1,
            "documents_at_a_time": documents_at_a_time(model, longest),
        }
    return splits


def documents_at_a_time(model: FrozenModel, longest: int) -> int:
    """The batch size. The sampled text depends on it, because rounding does.

    On a GPU, it depends on the size of the memory, not on the free memory.
    """
    if model.device.type != "cuda":
        return _CPU_DOCUMENTS
    memory = torch.cuda.get_device_properties(model.device).total_memory
    identity, weights = model.identity, model.model.get_memory_footprint()
    cache = 2 * identity.n_layers * identity.d_model * model.model.dtype.itemsize * longest
    return _that_fit(memory - weights, cache)


def _that_fit(memory: int, cache: int) -> int:
    """The largest power of two whose keys and values fill at most half of the memory."""
    fitting = max(1, memory // 2 // cache)
    return int(min(_MAX_GPU_DOCUMENTS, 1 << fitting.bit_length() - 1))


def sample_documents(
    model: FrozenModel, tokens: int, longest: int, progress: Advance | None = None
) -> list[list[int]]:
    """Sample whole documents at temperature 1 until they have enough tokens.

    A document starts after BOS (EOS if the tokenizer has no BOS) and ends before EOS or at the
    largest length. Batch i is sampled with seed i. The processes share the batches, so the result
    does not depend on their number.

    Args:
        tokens: the number of tokens to sample, including an EOS after every document.
        longest: the largest number of tokens of a document, including the BOS before it.

    Raises:
        InputError: the tokenizer has no EOS token, or every document of a batch is empty.
    """
    if model.tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {model.name} has no EOS token, so documents have no end; give "
            "another --dataset"
        )
    state = PartialState()
    advance: Advance = progress or (lambda _: None)
    found: list[list[int]] = []
    count = 0
    for first in itertools.count(0, state.num_processes):
        own = _sample_batch(
            model,
            longest,
            seed=first + state.process_index,
            progress=lambda sampled: advance(sampled * state.num_processes),
        )
        documents = [document for document in gather_object(own) if document]
        if not documents:
            raise InputError(f"{model.name} generates only empty documents; give another --dataset")
        for document in documents:
            found.append(document)
            count += len(document) + 1
            if count >= tokens:
                return found
    raise AssertionError("the loop above has no end")


@contextmanager
def only_settings(model: FrozenModel, config: GenerationConfig) -> Iterator[None]:
    """Let the model's `generate` use only this config, without the model's own defaults."""
    original = model.model.generation_config
    model.model.generation_config = config
    try:
        yield
    finally:
        model.model.generation_config = original


def _sample_batch(
    model: FrozenModel, longest: int, seed: int, progress: Advance
) -> list[list[int]]:
    bos, eos = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    count = documents_at_a_time(model, longest)
    start = torch.full((count, 1), eos if bos is None else bos, device=model.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest - 1,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), only_settings(model, config):
        torch.manual_seed(seed)
        written = model.model.generate(
            start,
            attention_mask=torch.ones_like(start),
            stopping_criteria=[_Counter(eos, progress)],
        )
    return [
        list(itertools.takewhile(lambda token: token != eos, line))
        for line in written[:, 1:].tolist()
    ]


class _Counter(StoppingCriteria):
    """Counts the tokens as they are sampled. It never stops the generation."""

    def __init__(self, eos: int, progress: Advance) -> None:
        self._eos, self._progress = eos, progress

    def __call__(
        self,
        input_ids: Int[Tensor, "batch seq"],
        scores: object,  # noqa: ARG002 - part of the interface
        **_kwargs: object,
    ) -> Tensor:
        self._progress(int((input_ids[:, -1] != self._eos).sum()))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
