"""Text into fixed-length blocks of tokens: read, split, joined by EOS, packed."""

import dataclasses
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunedlens.config import CorpusConfig
from tunedlens.corpus.packing import (
    Batch,
    Corpora,
    Corpus,
    PackedCorpus,
    Packer,
    StreamedCorpus,
    TextRanOutError,
    encoded,
    split_by_hash,
    token_bytes,
)
from tunedlens.corpus.reading import (
    embedded_documents,
    is_on_hub,
    is_stream,
    read_documents,
)
from tunedlens.errors import InputError
from tunedlens.frozen import EMBEDDED, FrozenModel

__all__ = [
    "DEFAULT_HUB_DATASET",
    "EMBEDDED",
    "Batch",
    "Corpora",
    "Corpus",
    "PackedCorpus",
    "Packer",
    "StreamedCorpus",
    "TextRanOutError",
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
    _require_consistent(config)
    packer = Packer(tokenizer)
    name, seq_len = config.dataset, config.seq_len

    def corpus(documents: Any, held_out: bool | None = None) -> Corpus:
        if is_stream(documents):
            return StreamedCorpus(documents, packer, seq_len, name, held_out)
        return PackedCorpus.pack(encoded(documents, packer), seq_len, name)

    if name == EMBEDDED:
        return Corpora(
            lambda: corpus(embedded_documents("train")),
            lambda: corpus(embedded_documents("validation")),
        )
    train = read_documents(config, config.dataset_split)
    if config.validation_split is not None:
        validation = read_documents(config, config.validation_split)
        return Corpora(lambda: corpus(train), lambda: corpus(validation))
    if is_stream(train):
        return Corpora(lambda: corpus(train, held_out=False), lambda: corpus(train, held_out=True))
    return split_by_hash(train, packer, seq_len, name)


def _require_consistent(config: CorpusConfig) -> None:
    if config.validation_split == config.dataset_split:
        raise InputError(
            f"--validation-split must be another than --dataset-split, both are "
            f"{config.dataset_split!r}"
        )
    if not is_on_hub(str(config.dataset)):
        given = {
            "--dataset-config": config.dataset_config,
            "--dataset-revision": config.dataset_revision,
            "--validation-split": config.validation_split,
            "--dataset-split": None if config.dataset_split == "train" else config.dataset_split,
        }
        for flag, value in given.items():
            if value is not None:
                raise InputError(
                    f"{flag} {value} is for datasets on the hub; {config.dataset} is local"
                )
