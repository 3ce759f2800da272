"""Long texts are tokenised in pieces, because a tokenizer takes about 250 bytes for each letter.

The pieces overlap. A text is cut between two tokens only where both pieces agree on all tokens
around the cut, so that the tokens are those of the whole text.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

from tunedlens.errors import InputError

PIECE, OVERLAP = 2**16, 2**10
"""The lengths of a piece and of an overlap, in characters. A cut is in the middle of an overlap."""
MAX_PIECE = 2**22
"""A text needs longer pieces only if its tokens depend on all of the text before them."""


class _Tokens(NamedTuple):
    """The tokens of a part of a text."""

    ids: list[int]
    starts: list[int]
    """The indices of the characters at which they start, in ascending order."""
    end: int
    """The index at which the part ends."""

    def between(self, low: int, high: int) -> "_Tokens":
        """The tokens that start in [low, high)."""
        part = slice(bisect_left(self.starts, low), bisect_left(self.starts, high))
        return _Tokens(self.ids[part], self.starts[part], high)


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], is_chat: bool
) -> list["array[int]"]:
    """The token ids of each text, in 32 bits.

    A text is cut only if the tokenizer reports where tokens start.

    Args:
        is_chat: whether special tokens that are written out in a text are encoded as such.

    Raises:
        InputError: a long text cannot be cut.
    """

    def tokenise(text: str | list[str], has_offsets: bool = False) -> BatchEncoding:
        return tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=not is_chat,
            return_offsets_mapping=has_offsets,
            verbose=False,
        )

    short = [text for text in texts if len(text) <= PIECE or not tokenizer.is_fast]
    of_short = iter(tokenise(short)["input_ids"] if short else [])
    return [
        array("i", chain.from_iterable(_pieces(text, tokenise)))
        if len(text) > PIECE and tokenizer.is_fast
        else array("i", next(of_short))
        for text in texts
    ]


def _pieces(text: str, tokenise: Callable[..., BatchEncoding]) -> Iterator[list[int]]:
    """The token ids of a long text, piece by piece."""

    def read(begin: int, size: int) -> _Tokens:
        part = text[begin : begin + size]
        encoded = tokenise(part, True)
        starts = [begin + start for start, _ in encoded["offset_mapping"]]
        return _Tokens(encoded["input_ids"], starts, begin + len(part))

    done = begin = 0
    size, overlap = PIECE, OVERLAP
    piece = read(begin, size)
    while piece.end < len(text):
        cut = piece.starts[bisect_left(piece.starts, piece.end - overlap) - 1]
        next_begin = piece.starts[max(0, bisect_left(piece.starts, cut - overlap) - 1)]
        following = read(next_begin, size)
        around = (max(done, cut - overlap // 2), cut + overlap // 2)
        if cut > done and piece.between(*around) == following.between(*around):
            yield piece.between(done, cut).ids
            done, begin, piece = cut, next_begin, following
            size, overlap = PIECE, OVERLAP
            continue
        size, overlap = 4 * size, 4 * overlap
        if size > MAX_PIECE:
            raise InputError(
                f"the text {text[:20]!r}... has {len(text):,} characters and cannot be cut after "
                f"character {done:,}; divide it into shorter documents"
            )
        piece = read(begin, size)
    yield piece.between(done, len(text) + 1).ids
