"""Text into fixed-length blocks of tokens: read, split, joined by EOS, packed."""

import dataclasses
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunedlens.config import CorpusConfig
from tunedlens.corpus.packing import (
    HELD_OUT_SHARE,
    Batch,
    Corpora,
    Corpus,
    PackedCorpus,
    Packer,
    StreamedCorpus,
    split_by_hash,
    token_bytes,
)
from tunedlens.corpus.reading import EMBEDDED, embedded_documents, read_documents
from tunedlens.errors import InputError
from tunedlens.frozen import FrozenModel

__all__ = [
    "DEFAULT_HUB_DATASET",
    "EMBEDDED",
    "HELD_OUT_SHARE",
    "Batch",
    "Corpora",
    "Corpus",
    "PackedCorpus",
    "Packer",
    "StreamedCorpus",
    "load_corpora",
    "token_bytes",
    "with_defaults",
]

DEFAULT_HUB_DATASET = "vietgpt/openwebtext_en"
"""OpenWebText, an open remake of GPT-2's own training text, as Parquet files."""

LONGEST_DEFAULT_BLOCK = 1024


def with_defaults(config: CorpusConfig, model: FrozenModel) -> CorpusConfig:
    """The same with nothing left open: which text, how long a block.

    Raises:
        InputError: the block is longer than the model's context.
    """
    seq_len = config.seq_len or min(model.context or LONGEST_DEFAULT_BLOCK, LONGEST_DEFAULT_BLOCK)
    if model.context is not None and seq_len > model.context:
        raise InputError(
            f"--seq-len must be at most {model.context}, the context of {model.name}; got {seq_len}"
        )
    if config.dataset is not None:
        return dataclasses.replace(config, seq_len=seq_len)
    if model.name == EMBEDDED:
        return dataclasses.replace(config, dataset=EMBEDDED, seq_len=seq_len)
    return dataclasses.replace(config, dataset=DEFAULT_HUB_DATASET, streaming=True, seq_len=seq_len)


def load_corpora(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> Corpora:
    """Read a text and split it into training and validation.

    Args:
        config: as `with_defaults` gives it.
        tokenizer: the model's.

    Raises:
        InputError: there is no such text, it is empty or too short, has no such column,
            cannot be decoded, or the hub cannot be reached.
    """
    if config.dataset is None or config.seq_len is None:
        raise InputError("load_corpora needs a dataset and a seq_len; see with_defaults")
    packer = Packer(tokenizer)
    name, seq_len = config.dataset, config.seq_len

    def packed(documents: Any) -> PackedCorpus:
        return PackedCorpus.pack(documents, packer, seq_len, name)

    def streamed(documents: Any, held_out: bool | None) -> StreamedCorpus:
        return StreamedCorpus(documents, packer, seq_len, name, held_out)

    def read(split: str) -> Any:
        return read_documents(config, split)

    if name == EMBEDDED:
        return Corpora(
            lambda: packed(embedded_documents("train")),
            lambda: packed(embedded_documents("validation")),
        )
    train, validation = config.dataset_split, config.validation_split
    if validation is None and config.streaming:
        return Corpora(lambda: streamed(read(train), False), lambda: streamed(read(train), True))
    if validation is None:
        return split_by_hash(read(train), packer, seq_len, name)
    if config.streaming:
        return Corpora(
            lambda: streamed(read(train), None), lambda: streamed(read(validation), None)
        )
    return Corpora(lambda: packed(read(train)), lambda: packed(read(validation)))
