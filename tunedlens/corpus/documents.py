"""Documents as tokens, and the fraction of them that is held out."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunedlens.corpus.standard_library import HELD_OUT_FRACTION, hash_fraction
from tunedlens.errors import InputError
from tunedlens.tokenizer import token_bytes

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENTS_AT_A_TIME = 16


class Packer:
    """Turns documents into token ids, each followed by EOS.

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
        """Token ids of each text, with EOS at the end.

        Raises:
            InputError: the tokens do not represent the text byte for byte.
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
    """The last one is EOS."""
    text_bytes: int
    fraction: float
    """`hash_fraction` of the text."""


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


def hold_out(fractions: list[float]) -> list[bool]:
    """Which documents are held out: those with small hashes, but at least one, and never all."""
    order = sorted(range(len(fractions)), key=lambda i: (fractions[i], i))
    wanted = sum(fraction < HELD_OUT_FRACTION for fraction in fractions)
    chosen = set(order[: max(1, min(wanted, len(fractions) - 1))])
    return [i in chosen for i in range(len(fractions))]
