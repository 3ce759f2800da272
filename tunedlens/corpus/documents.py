"""Documents as tokens, and the fraction of them that is held out."""

import warnings
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunedlens.corpus.pieces import token_ids
from tunedlens.corpus.standard_library import HELD_OUT_FRACTION, hash_fraction
from tunedlens.distributed import gather, rank_and_count
from tunedlens.errors import InputError
from tunedlens.tokenizer import TokenBytes, required_bos

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENTS_AT_A_TIME = 16
_TOKENS_AT_A_TIME = 2**20
"""The number of tokens whose bytes are counted at a time."""


class Packer:
    """Turns documents into token ids, each followed by EOS, and those into blocks.

    Args:
        seq_len: tokens in a block.
        has_bos: whether every block starts with BOS.
        is_chat: whether special tokens that are written out in a text are encoded as such, because
            a chat template wrote them. If the text already has the BOS or EOS that the packer adds,
            no second one is added.

    Raises:
        InputError: the tokenizer has no EOS token, or BOS is wanted and it has no BOS token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        *,
        has_bos: bool = False,
        is_chat: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path} has no EOS token, which is needed to join "
                "documents"
            )
        self.seq_len = seq_len
        self.text_tokens = seq_len - has_bos
        """Tokens of text in a block."""
        self.eos_id: int = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._bos_id = required_bos(tokenizer) if has_bos else None
        self._token_bytes = TokenBytes.of(tokenizer, len(tokenizer))
        self._is_chat, self._has_warned = is_chat, False

    def encode(self, texts: list[str]) -> list[Int[Tensor, " tokens"]]:
        """Token ids of each text, with EOS at the end."""
        documents = []
        starts = ends = False
        for text, ids in zip(texts, token_ids(self._tokenizer, texts, self._is_chat), strict=True):
            if self._is_chat:
                starts = ids[:1].tolist() == [self._bos_id]
                ends = ids[starts:][-1:].tolist() == [self.eos_id]
            ids.insert(0, self.eos_id)
            ids.append(self.eos_id)
            document = torch.frombuffer(ids, dtype=torch.int32)
            self._compare_bytes(text, document[:-1])
            documents.append(document[1 + starts : len(document) - ends])
        return documents

    def count_bytes(self, ids: Int[Tensor, " tokens"]) -> int:
        """The bytes of text that the tokens after the first stand for."""
        counts = self._token_bytes
        if counts is None:
            return len(str(self._tokenizer.decode(ids[1:], skip_special_tokens=True)).encode())
        firsts = range(0, len(ids) - 1, _TOKENS_AT_A_TIME)
        parts = (ids[first : first + _TOKENS_AT_A_TIME + 1] for first in firsts)
        return sum(int(counts.next_bytes(part.long()).sum()) for part in parts)

    def to_blocks(self, stream: Int[Tensor, " tokens"]) -> Int[Tensor, "blocks seq"]:
        """Cut a stream of tokens into blocks. Tokens at the end that fill no block are left out."""
        count = len(stream) // self.text_tokens
        blocks = stream[: count * self.text_tokens].view(count, self.text_tokens)
        if self._bos_id is None:
            return blocks
        return torch.cat([blocks.new_full((count, 1), self._bos_id), blocks], 1)

    def _compare_bytes(self, text: str, ids: Int[Tensor, " tokens"]) -> None:
        """Warn once if the tokens do not represent the text byte for byte."""
        if self._token_bytes is None or self._has_warned:
            return
        expected, actual = len(text.encode()), self.count_bytes(ids)
        if self._is_chat:
            special = ids[1:][self._token_bytes.is_special[ids[1:]]].tolist()
            names = self._tokenizer.convert_ids_to_tokens(special)
            expected -= sum(len(name.encode()) for name in names)
        if expected != actual:
            self._has_warned = True
            warnings.warn(
                f"the tokenizer {self._tokenizer.name_or_path} turned {expected} bytes of text "
                f"into tokens for {actual} bytes; bits per byte count the bytes of the tokens",
                stacklevel=2,
            )


class Document(NamedTuple):
    """One text as tokens."""

    ids: Int[Tensor, " tokens"]
    """The last one is EOS."""
    text_bytes: int
    fraction: float
    """`hash_fraction` of the text or the token ids."""


class _Share(NamedTuple):
    """What one process contributes to the next texts."""

    runs: int
    fractions: list[float]
    """`hash_fraction` of every text."""
    ids: list[Int[Tensor, " tokens"]]
    """The tokens of the texts that this process tokenises."""


def tokenised(runs: Iterator[list[str]], packer: Packer, name: str) -> Iterator[list[Document]]:
    """The documents of a text, a few at a time.

    Several processes share the work: each reads all texts and tokenises every n-th of them.

    Args:
        runs: the texts, a few at a time.
        name: the name of the text in messages.

    Raises:
        InputError: reading fails in a process, or the processes read different texts.
    """
    rank, count = rank_and_count()
    texts: list[str] = []

    def read_share() -> _Share:
        read = list(islice(runs, count))
        texts[:] = chain.from_iterable(read)
        own = texts[rank::count]
        return _Share(len(read), list(map(hash_fraction, texts)), packer.encode(own))

    while True:
        shares = gather(read_share)
        first = shares[0]
        if any(share[:2] != first[:2] for share in shares):
            raise InputError(
                f"the text {name} is not the same in all processes; expected the same files or "
                "revision on all machines"
            )
        if not first.runs:
            return
        ids = [shares[index % count].ids[index // count] for index in range(len(texts))]
        yield [
            Document(tokens, len(text.encode()), fraction)
            for tokens, text, fraction in zip(ids, texts, first.fractions, strict=True)
        ]


def encoded(documents: "Dataset", packer: Packer, name: str) -> list[Document]:
    """Every document with a text, in order."""
    rows = (run["text"] for run in documents.iter(DOCUMENTS_AT_A_TIME))
    runs = ([text for text in run if text] for run in rows)
    return list(chain.from_iterable(tokenised(runs, packer, name)))


def from_ids(documents: list[list[int]], packer: Packer) -> list[Document]:
    """Token ids as documents; an EOS is added at the end of each."""
    found = []
    for tokens in documents:
        ids = torch.tensor([packer.eos_id, *tokens, packer.eos_id], dtype=torch.int32)
        fraction = hash_fraction(ids.numpy().tobytes())
        found.append(Document(ids[1:], packer.count_bytes(ids), fraction))
    return found


def hold_out(fractions: list[float]) -> list[bool]:
    """Which documents are held out: those with small hashes, at least one and never all."""
    order = sorted(range(len(fractions)), key=lambda i: (fractions[i], i))
    wanted = sum(fraction < HELD_OUT_FRACTION for fraction in fractions)
    chosen = set(order[: max(1, min(wanted, len(fractions) - 1))])
    return [i in chosen for i in range(len(fractions))]
