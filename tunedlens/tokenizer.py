"""Token ids as bytes, as plain text, and as a reader sees them."""

import unicodedata
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
_REPLACED = "\ufffd"


class TokenText(NamedTuple):
    """A token in plain text and as a reader sees it."""

    text: str
    shown: str


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> TokenText:
    """A token as given by `as_text` and by `shown`."""
    return TokenText(as_text(tokenizer, token_id), shown(tokenizer, token_id))


def shown(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token with visible white space; incomplete characters are written as hexadecimal bytes.

    An id without a token becomes `#id`.
    """
    text = str(tokenizer.decode([token_id]))
    if _REPLACED in text:
        name = tokenizer.convert_ids_to_tokens(token_id)
        letters = _bytes_of_letters()
        if isinstance(name, str) and all(letter in letters for letter in name):
            return "⟨" + " ".join(f"{letters[letter]:02x}" for letter in name) + "⟩"
    if not text:
        return f"#{token_id}"
    return visible(text)


def visible(text: str) -> str:
    """A text with visible white space; other unprintable characters are written as hexadecimal."""
    return "".join(
        letter if letter.isprintable() else f"⟨{letter.encode().hex(' ')}⟩"
        for letter in text.translate(_VISIBLE)
    )


def as_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as plain text; incomplete characters are written as in `shown`."""
    text = str(tokenizer.decode([token_id]))
    return shown(tokenizer, token_id) if _REPLACED in text else text


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " vocab"]:
    """The number of bytes of text in each token of a byte-level BPE; 0 for special tokens."""
    special = set(tokenizer.all_special_ids)
    # In a byte-level vocabulary every character of a token's name is one byte.
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if i in special else len(name or "") for i, name in enumerate(names)])


def display_width(text: str) -> int:
    """The columns of a text in a terminal: 2 for wide characters, 0 for combining ones."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if _is_wide(letter) else 1 for letter in text
    )


def _is_wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary represents.

    Printable bytes represent themselves; the others are numbered from 256.

    Source:
        Radford et al. 2019, GPT-2's encoder.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
