"""Documents into blocks of tokens, in memory or while they stream by.

The blocks depend on nothing but the text and the tokenizer, and a batch on nothing but
the seed and its index; workers and processes do not come into it.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunedlens.embedded import hash_fraction
from tunedlens.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HELD_OUT_SHARE = 0.05
"""Share of documents (or blocks) held out where no validation split is named."""

_DOCUMENTS_AT_A_TIME = 64


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
            InputError: the text ran out.
        """

    def blocks(self) -> Iterator[Int[Tensor, " seq"]]:
        """Every block once, in the order of the text."""


class Corpora:
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


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " vocab"]:
    """How many bytes of text each token of a byte-level BPE stands for; 0 for EOS."""
    special = set(tokenizer.all_special_ids)
    # In a byte-level vocabulary every character of a token's name is one byte.
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if i in special else len(name or "") for i, name in enumerate(names)])


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
    def pack(cls, documents: "Dataset", packer: Packer, seq_len: int, name: str) -> Self:
        """All documents, joined and cut.

        Raises:
            InputError: there is less than one block.
        """
        stream, count_documents, text_bytes = [torch.tensor([], dtype=torch.int32)], 0, 0
        for rows in documents.iter(_DOCUMENTS_AT_A_TIME):
            if texts := [text for text in rows["text"] if text]:
                stream += packer.encode(texts)
                count_documents += len(texts)
                text_bytes += sum(len(text.encode()) for text in texts)
        tokens = torch.cat(stream)
        count, dropped = divmod(len(tokens), seq_len)
        if not text_bytes:
            raise InputError(f"{name} is empty: expected text")
        if not count:
            raise InputError(
                f"{name} has {len(tokens)} tokens, less than one block of {seq_len}; "
                "give more text or a smaller --seq-len"
            )
        about = {
            "dataset": name,
            "documents": count_documents,
            "bytes": text_bytes,
            "tokens": len(tokens),
            "dropped_tokens": dropped,
            "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        }
        return cls(tokens[: count * seq_len].view(count, seq_len), about)

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

    def half(self, held_out: bool) -> "PackedCorpus":
        """The blocks that are held out, or the others, by the hash of each.

        Raises:
            InputError: there are not two blocks, one for either side.
        """
        if len(self._blocks) < 2:
            raise InputError(
                f"{self.about['dataset']} is one block of {self._blocks.shape[1]} tokens; expected "
                "at least two, one to train on and one to hold out: give more text or a smaller "
                "--seq-len"
            )
        fractions = [hash_fraction(block.numpy().tobytes()) for block in self._blocks]
        return PackedCorpus(
            self._blocks[torch.tensor(_held_out(fractions)) == held_out], self.about
        )


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
        self.about = {"dataset": name, "streamed": True}

    def batches(
        self,
        batch_size: int,
        seed: int,  # noqa: ARG002 - a stream keeps the order of its text
        position: dict[str, Any] | None = None,
    ) -> Iterator[Batch]:
        needed = batch_size * self._seq_len
        if position is not None:
            self._documents.load_state_dict(position["documents"])
        left = torch.tensor(position["left"] if position else [], dtype=torch.int32)
        for tokens in self._runs():
            left = torch.cat([left, tokens])
            while len(left) >= needed:
                rows, left = left[:needed], left[needed:]
                position = {"documents": self._documents.state_dict(), "left": left.tolist()}
                yield Batch(rows.view(batch_size, self._seq_len).long(), position)
        raise InputError(
            f"the text {self.about['dataset']} ran out: {len(left)} tokens are left and a batch "
            f"needs {needed}; ask for fewer --tokens or give more text"
        )

    def blocks(self) -> Iterator[Int[Tensor, " seq"]]:
        left = torch.tensor([], dtype=torch.int32)
        for tokens in self._runs():
            left = torch.cat([left, tokens])
            while len(left) >= self._seq_len:
                yield left[: self._seq_len].long()
                left = left[self._seq_len :]

    def _runs(self) -> Iterator[Int[Tensor, " tokens"]]:
        for rows in self._documents.iter(_DOCUMENTS_AT_A_TIME):
            texts = [
                text
                for text in rows["text"]
                if text and self._held_out in (None, hash_fraction(text) < HELD_OUT_SHARE)
            ]
            if texts:
                yield torch.cat(self._packer.encode(texts))


def split_by_hash(documents: "Dataset", packer: Packer, seq_len: int, name: str) -> Corpora:
    """Hold out a share of the documents by the hash of each, or of a single one's blocks.

    Where the share comes to nothing, the one with the smallest hash is held out. Either
    side raises an `InputError` when it is made of less than one block.
    """
    if len(documents) == 1:
        whole = cache(lambda: PackedCorpus.pack(documents, packer, seq_len, name))
        return Corpora(lambda: whole().half(held_out=False), lambda: whole().half(held_out=True))
    held_out = _held_out(
        [hash_fraction(text) for rows in documents.iter(1) for text in rows["text"]]
    )

    def side(wanted: bool) -> PackedCorpus:
        rows = [i for i, held in enumerate(held_out) if held == wanted]
        return PackedCorpus.pack(documents.select(rows), packer, seq_len, name)

    return Corpora(lambda: side(False), lambda: side(True))


def _held_out(fractions: list[float]) -> list[bool]:
    threshold = max(HELD_OUT_SHARE, min(fractions, default=0.0) + 1e-12)
    return [fraction < threshold for fraction in fractions]
