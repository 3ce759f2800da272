"""Documents as tokens, and the fraction of them that is held out."""

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunedlens.corpus.pieces import token_ids
from tunedlens.corpus.standard_library import HELD_OUT_FRACTION, hash_fraction
from tunedlens.errors import InputError
from tunedlens.tokenizer import TokenBytes, required_bos

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENTS_AT_A_TIME = 16


class Packer:
    """Turns documents into token ids, each followed by EOS, and those into blocks.

    Args:
        seq_len: tokens in a block.
        has_bos: whether every block starts with BOS.
        is_chat: whether special tokens that a text spells out are those tokens, because a chat
            template wrote them. A BOS or EOS where the packer puts one is not doubled.

    Raises:
        InputError: the tokenizer has no EOS token, or no BOS token that is asked for.
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
                f"the tokenizer {tokenizer.name_or_path} has no EOS token to join documents with"
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
        eos, documents = torch.tensor([self.eos_id], dtype=torch.int32), []
        for text, ids in zip(texts, token_ids(self._tokenizer, texts, self._is_chat), strict=True):
            self._compare_bytes(text, torch.cat([eos, ids]).long())
            if self._is_chat:
                starts, ends = ids[:1].tolist() == [self._bos_id], ids[-1:].tolist() == eos.tolist()
                ids = ids[starts : len(ids) - ends]
            documents.append(torch.cat([ids, eos]))
        return documents

    def count_bytes(self, ids: Int[Tensor, " tokens"]) -> int:
        """The bytes of text that the tokens after the first stand for."""
        if self._token_bytes is None:
            return len(str(self._tokenizer.decode(ids[1:], skip_special_tokens=True)).encode())
        return int(self._token_bytes.next_bytes(ids).sum())

    def to_blocks(self, stream: Int[Tensor, " tokens"]) -> Int[Tensor, "blocks seq"]:
        """Cut a stream of tokens into blocks; what fills no block at its end is left out."""
        count = len(stream) // self.text_tokens
        blocks = stream[: count * self.text_tokens].view(count, self.text_tokens)
        if self._bos_id is None:
            return blocks
        return torch.cat([blocks.new_full((count, 1), self._bos_id), blocks], 1)

    def _compare_bytes(self, text: str, ids: Int[Tensor, " tokens"]) -> None:
        """Warn once if the tokens do not represent the text byte for byte."""
        if self._token_bytes is None or self._has_warned:
            return
        expected, actual = len(text.encode()), int(self._token_bytes.next_bytes(ids).sum())
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


def encoded(documents: "Dataset", packer: Packer) -> list[Document]:
    """Every document with a text, in order."""
    runs = (row["text"] for row in documents.iter(DOCUMENTS_AT_A_TIME))
    return [document for run in runs for document in encode_texts([t for t in run if t], packer)]


def encode_texts(texts: list[str], packer: Packer) -> list[Document]:
    """Texts as documents."""
    ids = packer.encode(texts) if texts else []
    return [
        Document(document, len(text.encode()), hash_fraction(text))
        for text, document in zip(texts, ids, strict=True)
    ]


def from_ids(documents: list[list[int]], packer: Packer) -> list[Document]:
    """Token ids as documents; an EOS is added at the end of each."""
    found = []
    for tokens in documents:
        ids = torch.tensor([packer.eos_id, *tokens, packer.eos_id], dtype=torch.int32)
        fraction = hash_fraction(ids.numpy().tobytes())
        found.append(Document(ids[1:], packer.count_bytes(ids), fraction))
    return found


def hold_out(fractions: list[float]) -> list[bool]:
    """Which documents are held out: those with small hashes, but at least one, and never all."""
    order = sorted(range(len(fractions)), key=lambda i: (fractions[i], i))
    wanted = sum(fraction < HELD_OUT_FRACTION for fraction in fractions)
    chosen = set(order[: max(1, min(wanted, len(fractions) - 1))])
    return [i in chosen for i in range(len(fractions))]
