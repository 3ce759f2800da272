"""Turns a text into blocks of tokens: documents are read, split, joined by EOS and packed."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunedlens import builtin
from tunedlens.config import CorpusConfig
from tunedlens.corpus.blocks import Batch, Corpus, TextRanOutError
from tunedlens.corpus.documents import Packer, encoded, from_ids
from tunedlens.corpus.packed import PackedCorpus
from tunedlens.corpus.sources import (
    SELF,
    embedded_documents,
    is_on_hub,
    is_stream,
    read_documents,
)
from tunedlens.corpus.splits import CorpusSplits, split_by_hash
from tunedlens.corpus.streamed import StreamedCorpus
from tunedlens.distributed import together
from tunedlens.errors import InputError

__all__ = [
    "DEFAULT_HUB_DATASET",
    "LONGEST_DEFAULT_BLOCK",
    "SELF",
    "Batch",
    "Corpus",
    "CorpusSplits",
    "PackedCorpus",
    "Packer",
    "ResolvedCorpus",
    "StreamedCorpus",
    "TextRanOutError",
    "load_splits",
    "resolve_corpus",
    "split_ids",
]

DEFAULT_HUB_DATASET = "vietgpt/openwebtext_en"
"""OpenWebText, an open remake of GPT-2's own training text, as Parquet files."""

LONGEST_DEFAULT_BLOCK = 1024
"""The largest default length of a block, in tokens."""


@dataclass(frozen=True, kw_only=True)
class ResolvedCorpus(CorpusConfig):
    """A `CorpusConfig` in which the text and the blocks are fully determined."""

    dataset: str
    seq_len: int
    bos: bool


def resolve_corpus(
    config: CorpusConfig, model_name: str, context: int | None, has_bos: bool = False
) -> ResolvedCorpus:
    """Choose the text, the length of a block and its start where the config leaves them open.

    Args:
        config: the given settings.
        model_name: the name of the model, which decides on the default text.
        context: the longest sequence that the model reads, in tokens.
        has_bos: whether the model's tokenizer puts BOS before a text.

    Raises:
        InputError: the block is longer than the model's context.
    """
    seq_len = config.seq_len or min(context or LONGEST_DEFAULT_BLOCK, LONGEST_DEFAULT_BLOCK)
    if context is not None and seq_len > context:
        raise InputError(
            f"--seq-len must be at most {context}, the context of {model_name}; got {seq_len}"
        )
    dataset, streaming = config.dataset, config.streaming
    if dataset is None and model_name == builtin.NAME:
        dataset = builtin.NAME
    elif dataset is None:
        dataset, streaming = DEFAULT_HUB_DATASET, True
    bos = has_bos if config.bos is None else config.bos
    chosen = {"dataset": dataset, "seq_len": seq_len, "streaming": streaming, "bos": bos}
    return ResolvedCorpus(**vars(config) | chosen)


def load_splits(config: ResolvedCorpus, tokenizer: PreTrainedTokenizerBase) -> CorpusSplits:
    """Read a text and split it into training and validation.

    Args:
        config: the result of `resolve_corpus`.

    Raises:
        InputError: there is no such text, it is empty or too short, has no such column,
            or the hub cannot be reached.
    """
    together(lambda: _require_consistent(config))
    assert config.dataset != SELF, "only the model can sample its text"
    packer = Packer(tokenizer, config.seq_len, has_bos=config.bos, is_chat=config.chat)
    name = config.dataset

    def corpus(documents: Any, held_out: bool | None = None) -> Corpus:
        if is_stream(documents):
            return StreamedCorpus(documents, packer, name, held_out)
        return PackedCorpus.pack(encoded(documents, packer, name), packer, name)

    if name == builtin.NAME:
        return CorpusSplits(
            lambda: corpus(together(lambda: embedded_documents("train"))),
            lambda: corpus(together(lambda: embedded_documents("validation"))),
        )
    train = together(lambda: read_documents(config, config.dataset_split, tokenizer))
    held_out = config.validation_split
    if held_out is not None:
        validation = together(lambda: read_documents(config, held_out, tokenizer))
        return CorpusSplits(lambda: corpus(train), lambda: corpus(validation))
    if is_stream(train):
        return CorpusSplits(
            lambda: corpus(train, held_out=False), lambda: corpus(train, held_out=True)
        )
    return split_by_hash(encoded(train, packer, name), packer, name)


def split_ids(
    config: ResolvedCorpus, tokenizer: PreTrainedTokenizerBase, documents: list[list[int]]
) -> CorpusSplits:
    """Split documents that are token ids, without EOS, into training and validation.

    Raises:
        InputError: there are not two blocks, one for each split, or a setting does not apply to
            token ids.
    """
    _require_consistent(config)
    packer = Packer(tokenizer, config.seq_len, has_bos=config.bos)
    return split_by_hash(from_ids(documents, packer), packer, config.dataset)


def _require_consistent(config: ResolvedCorpus) -> None:
    if config.validation_split == config.dataset_split:
        raise InputError(
            f"--validation-split must differ from --dataset-split; both are "
            f"{config.dataset_split!r}"
        )
    if not is_on_hub(config.dataset):
        given = {
            "--dataset-config": config.dataset_config,
            "--dataset-revision": config.dataset_revision,
            "--validation-split": config.validation_split,
            "--dataset-split": None if config.dataset_split == "train" else config.dataset_split,
        }
        for flag, value in given.items():
            if value is not None:
                raise InputError(
                    f"{flag} {value} works only with datasets on the hub, and {config.dataset} is "
                    "local; leave it out"
                )
    if config.chat and config.dataset in (builtin.NAME, SELF):
        raise InputError(f"--chat needs rows of conversations; --dataset {config.dataset} has none")
    if config.dataset != SELF and config.self_tokens is not None:
        raise InputError(f"--self-tokens works only with --dataset {SELF}; leave it out")
    if config.dataset == SELF and (config.streaming or config.text_column is not None):
        flag = "--streaming" if config.streaming else "--text-column"
        raise InputError(f"{flag} does not work with --dataset {SELF}; leave it out")
