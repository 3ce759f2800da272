"""Converts token ids to bytes, to plain text, and to text with visible white space."""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunedlens.errors import InputError, first_line
from tunedlens.escaping import printable

_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
_WORD_START = "▁"  # SentencePiece's letter for a space


class TokenText(NamedTuple):
    """A token in plain text and as a reader sees it."""

    text: str
    """See `as_text`."""
    shown: str
    """See `shown`."""


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> TokenText:
    """Both forms of a token."""
    return TokenText(as_text(tokenizer, token_id), shown(tokenizer, token_id))


def shown(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token with visible white space; bytes that form no whole character are hexadecimal.

    An id without a token becomes `#id`.
    """
    text = _decoded(tokenizer, token_id)
    if isinstance(text, bytes):
        return f"⟨{text.hex(' ')}⟩"
    return visible(text) if text else f"#{token_id}"


def visible(text: str) -> str:
    """A text with visible white space; other unprintable characters are hexadecimal."""
    return printable(text.translate(_VISIBLE))


def as_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as plain text; bytes that form no whole character are written as by `shown`."""
    text = _decoded(tokenizer, token_id)
    return shown(tokenizer, token_id) if isinstance(text, bytes) else text


def beginning_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that the tokenizer puts before every text, if it does."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids[:1] == [bos] else None


def required_bos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's BOS token.

    Raises:
        InputError: it has none.
    """
    if tokenizer.bos_token_id is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has no BOS token; leave out --bos"
        )
    return int(tokenizer.bos_token_id)


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    *,
    for_reply: bool = False,
) -> str:
    """A conversation as text, in the form of the tokenizer's chat template.

    Args:
        messages: turns with `role` and `content`. Keys that are None are left out.
        for_reply: whether the text ends where the model's reply begins.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; leave out --chat, or "
            "use a model that was trained on conversations"
        )
    turns: list[Any] = [{k: v for k, v in turn.items() if v is not None} for turn in messages]
    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=for_reply)
        )
    except Exception as error:  # a template may raise anything
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation: "
            f"{first_line(error)}"
        ) from error


class TokenBytes(NamedTuple):
    """How many bytes of text each token stands for."""

    counts: Int[Tensor, " vocab"]
    """0 for special tokens."""
    is_special: Bool[Tensor, " vocab"]
    added: int
    """The number of bytes that the tokenizer adds before a text: 1 if it adds a space, else 0."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> "TokenBytes | None":
        """Read a tokenizer; None if the bytes of its tokens cannot be known.

        They are known for byte-level BPE, as in GPT-2, and for SentencePiece, as in Llama 2.

        Args:
            vocab_size: the model's, which may have more ids than the tokenizer.
        """
        found = _bytes_of_tokens(tokenizer, range(len(tokenizer)))
        counts = [0 if one is None else len(one) for one in found]
        special = torch.zeros(vocab_size, dtype=torch.bool)
        special[[i for i in tokenizer.all_special_ids if i < vocab_size]] = True
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        added = sum(counts[i] for i in ids) - 1
        if None in found or added not in (0, 1):
            return None
        padding = [0] * (vocab_size - len(counts))
        return cls(torch.tensor(counts + padding), special, added)

    def next_bytes(self, ids: Int[Tensor, "*rows positions"]) -> Int[Tensor, "*rows positions-1"]:
        """The bytes of text that every token but the first stands for.

        The first token after a special one is the start of a text. The space that some
        tokenizers add there is not counted.
        """
        counts = self.counts[ids[..., 1:]]
        is_start = self.is_special[ids[..., :-1]] & (counts > 0)
        return counts - self.added * is_start


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes | None:
    """The bytes of text that a token stands for; None if they cannot be known.

    Special tokens, and ids without a token, stand for no text.
    """
    return _bytes_of_tokens(tokenizer, [token_id])[0]


def _bytes_of_tokens(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]
) -> list[bytes | None]:
    """`token_bytes` of many tokens: the tokenizer's tables are made once for all of them."""
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    read = _name_reader(tokenizer)

    def bytes_of(token_id: int, name: str | None) -> bytes | None:
        if token_id in special or name is None:
            return b""
        if token_id in added:
            token = added[token_id]
            return b"" if token.special else token.content.encode()
        return None if read is None else read(name)

    names = tokenizer.convert_ids_to_tokens(list(token_ids))
    return [bytes_of(*pair) for pair in zip(token_ids, names, strict=True)]


def display_width(text: str) -> int:
    """The columns of a text in a terminal: 2 for wide characters, 0 for combining ones."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if _is_wide(letter) else 1 for letter in text
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str | bytes:
    """A token as text, or as bytes that form no whole character."""
    data = token_bytes(tokenizer, token_id)
    if not data:
        return str(tokenizer.decode([token_id]))
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _is_wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"


@lru_cache(maxsize=8)
def _name_reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes | None] | None:
    """The function from the name of a token to its bytes, from the tokenizer's decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return None
    # The decoder alone: serialising the whole tokenizer would write out its vocabulary.
    decoder = json.loads(backend.decoder.__getstate__())
    steps = {str(step["type"]): step for step in _steps(decoder)}
    if "ByteLevel" in steps:
        return _byte_level
    replaces = steps.get("Replace", {}).get("pattern") == {"String": _WORD_START}
    if "Metaspace" in steps or replaces:
        return _sentence_piece if "ByteFallback" in steps else _spaced
    return None


def _steps(decoder: object) -> Iterator[dict[str, object]]:
    """The steps of a decoder, which may be a sequence of decoders."""
    if isinstance(decoder, dict):
        yield decoder
        for step in decoder.get("decoders", []):
            yield from _steps(step)


def _byte_level(name: str) -> bytes | None:
    letters = _bytes_of_letters()
    return bytes(letters[letter] for letter in name) if set(name) <= letters.keys() else None


def _spaced(name: str) -> bytes:
    return name.replace(_WORD_START, " ").encode()


def _sentence_piece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return _spaced(name)


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
