"""Documents into blocks of tokens, in memory or while they stream by.

The blocks depend on nothing but the text and the tokenizer, and a batch on nothing but
the seed and its index; workers and processes do not come into it.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunedlens.corpus.standard_library import HELD_OUT_SHARE, hash_fraction
from tunedlens.errors import InputError, first_line
from tunedlens.tokenizer import token_bytes

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_DOCUMENTS_AT_A_TIME = 16
_NOTHING_READ = {"documents": 0, "bytes": 0, "tokens": 0}


class TextRanOutError(InputError):
    """There is no further batch in a stream."""


class Batch(NamedTuple):
    """Blocks of tokens, and where to go on after them."""

    input_ids: Int[Tensor, "batch seq"]
    position: dict[str, Any]
    """JSON-able; `Corpus.batches` goes on from it."""


class Corpus(Protocol):
    """One side (train or validation) of a text, as blocks."""

    about: dict[str, Any]
    """What was read, as far as it is known beforehand: JSON-able."""

    def batches(
        self, batch_size: int, seed: int, position: dict[str, Any] | None = None
    ) -> Iterator[Batch]:
        """Batches to train on, from the start or from where a batch left off.

        Raises:
            TextRanOutError: it did.
        """

    def blocks(self) -> Iterator[Int[Tensor, " seq"]]:
        """Every block once, in the order of the text."""

    def shuffled(self) -> Iterator[Int[Tensor, " seq"]]:
        """Every block once, in a fixed random order: the first ones stand for the whole text.

        A stream keeps its order.
        """


class CorpusSplits:
    """Both sides of a text, each made when first asked for; they never share a block.

    Args:
        train: makes the side to train on.
        validation: makes the side that is held out.
    """

    def __init__(self, train: Callable[[], Corpus], validation: Callable[[], Corpus]) -> None:
        self._train, self._validation = train, validation

    @cached_property
    def train(self) -> Corpus:
        return self._train()

    @cached_property
    def validation(self) -> Corpus:
        return self._validation()


class Packer:
    """Documents to token ids: tokenised as they stand, each followed by EOS.

    Raises:
        InputError: the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path} has no EOS token to join documents with"
            )
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes(tokenizer)

    def encode(self, texts: list[str]) -> list[Int[Tensor, " tokens"]]:
        """Token ids of each text, EOS at the end.

        Raises:
            InputError: the tokens do not stand for the text byte for byte.
        """
        # A text that spells out "<|endoftext|>" means those characters, not the token.
        encoded = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        documents = []
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            document = torch.tensor([*ids, self._tokenizer.eos_token_id], dtype=torch.int32)
            expected, found = len(text.encode()), int(self._token_bytes[document.long()].sum())
            if expected != found:
                raise InputError(
                    f"the tokenizer {self._tokenizer.name_or_path} turned {expected} bytes of "
                    f"text into tokens for {found} bytes; expected a byte-level BPE that keeps "
                    "the text as it is, like GPT-2's"
                )
            documents.append(document)
        return documents


class Document(NamedTuple):
    """One text as tokens."""

    ids: Int[Tensor, " tokens"]
    """EOS last."""
    text_bytes: int
    fraction: float
    """`hash_fraction` of the text."""


def encoded(documents: "Dataset", packer: Packer) -> list[Document]:
    """Every document that has a text, in order."""
    runs = (row["text"] for row in documents.iter(_DOCUMENTS_AT_A_TIME))
    return [document for run in runs for document in _encode([t for t in run if t], packer)]


def _encode(texts: list[str], packer: Packer) -> list[Document]:
    ids = packer.encode(texts) if texts else []
    return [
        Document(document, len(text.encode()), hash_fraction(text))
        for text, document in zip(texts, ids, strict=True)
    ]


class PackedCorpus:
    """Blocks in memory; every pass over them is in a new order.

    Args:
        blocks: the blocks, in the order of the text.
        about: what they were made of.
    """

    def __init__(self, blocks: Int[Tensor, "blocks seq"], about: dict[str, Any]) -> None:
        self._blocks = blocks
        self.about = about | {"blocks": len(blocks)}

    @classmethod
    def pack(cls, documents: list[Document], seq_len: int, name: str) -> Self:
        """Documents, joined and cut.

        Raises:
            InputError: there is less than one block.
        """
        if not documents:
            raise InputError(f"{name} is empty: expected text")
        stream = torch.cat([document.ids for document in documents])
        count, dropped = divmod(len(stream), seq_len)
        if not count:
            raise InputError(
                f"{name} has {len(stream)} tokens, less than one block of {seq_len}; "
                "give more text or a smaller --seq-len"
            )
        about = {
            "dataset": name,
            "documents": len(documents),
            "bytes": sum(document.text_bytes for document in documents),
            "tokens": len(stream),
            "dropped_tokens": dropped,
            "tokens_sha256": hashlib.sha256(stream.numpy().tobytes()).hexdigest(),
        }
        return cls(stream[: count * seq_len].view(count, seq_len), about)

    def split(self) -> tuple["PackedCorpus", "PackedCorpus"]:
        """The blocks to train on and those held out, by the hash of each.

        Raises:
            InputError: there are not two blocks, one for either side.
        """
        if len(self._blocks) < 2:
            raise InputError(
                f"{self.about['dataset']} is one block of {self._blocks.shape[1]} tokens; expected "
                "at least two, one to train on and one to hold out: give more text or a smaller "
                "--seq-len"
            )
        held_out = torch.tensor(
            _held_out([hash_fraction(block.numpy().tobytes()) for block in self._blocks])
        )
        return (
            PackedCorpus(self._blocks[~held_out], self.about),
            PackedCorpus(self._blocks[held_out], self.about),
        )

    def batches(
        self, batch_size: int, seed: int, position: dict[str, Any] | None = None
    ) -> Iterator[Batch]:
        count = len(self._blocks)
        order, shuffled_epoch = torch.arange(0), -1
        index = 0 if position is None else position["batch"]
        while True:
            rows = []
            for place in range(index * batch_size, (index + 1) * batch_size):
                epoch = place // count
                if epoch != shuffled_epoch:
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                    order, shuffled_epoch = torch.randperm(count, generator=generator), epoch
                rows.append(self._blocks[order[place % count]])
            index += 1
            yield Batch(torch.stack(rows).long(), {"batch": index})

    def blocks(self) -> Iterator[Int[Tensor, " seq"]]:
        yield from self._blocks.long()

    def shuffled(self) -> Iterator[Int[Tensor, " seq"]]:
        generator = torch.Generator().manual_seed(0)
        yield from self._blocks[torch.randperm(len(self._blocks), generator=generator)].long()


class StreamedCorpus:
    """Blocks made while the text is read, in the text's own order.

    Args:
        documents: rows with a column `text`.
        packer: makes tokens of them.
        seq_len: tokens in a block.
        name: what to call the text.
        held_out: which side of the split by hash to keep; None keeps every document.
    """

    def __init__(
        self,
        documents: "IterableDataset",
        packer: Packer,
        seq_len: int,
        name: str,
        held_out: bool | None,
    ) -> None:
        self._documents = documents
        self._packer = packer
        self._seq_len = seq_len
        self._held_out = held_out
        self.about: dict[str, Any] = {"dataset": name, "streamed": True}

    def batches(
        self,
        batch_size: int,
        seed: int,  # noqa: ARG002 - a stream keeps the order of its text
        position: dict[str, Any] | None = None,
    ) -> Iterator[Batch]:
        needed = batch_size * self._seq_len
        # A position is where the reader stood before it read the last run of documents, what
        # was left over then, and how many batches were made since.
        start = position or {"reader": None, "left": [], "batches": 0, "read": _NOTHING_READ}
        if start["reader"] is not None:
            self._documents.load_state_dict(start["reader"])
        stream = torch.tensor(start["left"], dtype=torch.int32)
        for run in self._runs():
            stream = torch.cat([stream, *(document.ids for document in run)])
            read = {
                "documents": start["read"]["documents"] + len(run),
                "bytes": start["read"]["bytes"] + sum(d.text_bytes for d in run),
                "tokens": start["read"]["tokens"] + sum(len(d.ids) for d in run),
            }
            self.about |= read
            for index in range(start["batches"], len(stream) // needed):
                rows = stream[index * needed : (index + 1) * needed].view(batch_size, -1)
                yield Batch(rows.long(), start | {"batches": index + 1})
            stream = stream[len(stream) - len(stream) % needed :]
            reader = self._documents.state_dict()
            start = {"reader": reader, "left": stream.tolist(), "batches": 0, "read": read}
        raise TextRanOutError(
            f"the text {self.about['dataset']} ran out: {len(stream)} tokens are left and a batch "
            f"needs {needed}; ask for fewer --tokens or give more text"
        )

    def shuffled(self) -> Iterator[Int[Tensor, " seq"]]:
        return self.blocks()

    def blocks(self) -> Iterator[Int[Tensor, " seq"]]:
        stream = torch.tensor([], dtype=torch.int32)
        for run in self._runs():
            stream = torch.cat([stream, *(document.ids for document in run)])
            count = len(stream) // self._seq_len
            yield from stream[: count * self._seq_len].view(count, self._seq_len).long()
            stream = stream[count * self._seq_len :]
        self.about["dropped_tokens"] = len(stream)

    def _runs(self) -> Iterator[list[Document]]:
        """This side's documents, a few at a time.

        Raises:
            InputError: the text cannot be read on.
        """
        runs = self._documents.iter(_DOCUMENTS_AT_A_TIME)
        while True:
            try:
                rows = next(runs)
            except StopIteration:
                return
            except Exception as error:  # datasets raises whatever its many readers meet
                raise InputError(
                    f"cannot read on in {self.about['dataset']}: {first_line(error)}"
                ) from error
            texts = [
                text
                for text in rows["text"]
                if text and self._held_out in (None, hash_fraction(text) < HELD_OUT_SHARE)
            ]
            yield _encode(texts, self._packer)


def split_by_hash(documents: "Dataset", packer: Packer, seq_len: int, name: str) -> CorpusSplits:
    """Hold out a share of the documents by the hash of each.

    Of a single document, or where one side would have less than a block, a share of the
    blocks is held out instead.

    Raises:
        InputError: there are not two blocks, one for either side.
    """
    everything = encoded(documents, packer)
    held_out = _held_out([document.fraction for document in everything])
    sides = [
        [d for d, held in zip(everything, held_out, strict=True) if held == side]
        for side in (False, True)
    ]
    if all(sum(len(document.ids) for document in side) >= seq_len for side in sides):
        train, validation = (PackedCorpus.pack(side, seq_len, name) for side in sides)
    else:
        train, validation = PackedCorpus.pack(everything, seq_len, name).split()
    return CorpusSplits(lambda: train, lambda: validation)


def _held_out(fractions: list[float]) -> list[bool]:
    """Those below the share; at least one and, of several, not all."""
    order = sorted(range(len(fractions)), key=lambda i: (fractions[i], i))
    wanted = sum(fraction < HELD_OUT_SHARE for fraction in fractions)
    chosen = set(order[: max(1, min(wanted, len(fractions) - 1))])
    return [i in chosen for i in range(len(fractions))]
