"""The training and validation split of a text."""

from collections.abc import Callable
from functools import cached_property

from tunedlens.corpus.blocks import Corpus
from tunedlens.corpus.documents import Document, Packer, hold_out
from tunedlens.corpus.packed import PackedCorpus


class CorpusSplits:
    """The training and validation split of a text; they never have a block in common.

    Args:
        train: makes the training split, when it is first used.
        validation: makes the validation split, when it is first used.
    """

    def __init__(self, train: Callable[[], Corpus], validation: Callable[[], Corpus]) -> None:
        self._train, self._validation = train, validation

    @cached_property
    def train(self) -> Corpus:
        return self._train()

    @cached_property
    def validation(self) -> Corpus:
        return self._validation()


def split_by_hash(documents: list[Document], packer: Packer, name: str) -> CorpusSplits:
    """Hold out a fraction of the documents by the hash of each.

    A single document is split by blocks instead. Documents are split by blocks too if one of the
    splits would have less than a block.

    Raises:
        InputError: there are not two blocks, one for each split.
    """
    held_out = hold_out([document.fraction for document in documents])
    splits = [
        [d for d, held in zip(documents, held_out, strict=True) if held == is_validation]
        for is_validation in (False, True)
    ]
    if all(sum(len(d.ids) for d in split) >= packer.text_tokens for split in splits):
        train, validation = (PackedCorpus.pack(split, packer, name) for split in splits)
    else:
        train, validation = PackedCorpus.pack(documents, packer, name).split()
    return CorpusSplits(lambda: train, lambda: validation)
