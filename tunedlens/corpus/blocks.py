"""The interface of a corpus: blocks of tokens, in batches or one by one."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from jaxtyping import Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.files import JsonObject


class TextRanOutError(InputError):
    """There is no further batch in a stream."""


class Batch(NamedTuple):
    """Blocks of tokens, and the position after them."""

    input_ids: Int[Tensor, "batch seq"]
    position: JsonObject
    """Where `Corpus.batches` can continue. It can be written as JSON."""


class Corpus(Protocol):
    """One split (train or validation) of a text, as blocks."""

    about: JsonObject
    """A description of the text, as far as it is known. It can be written as JSON."""

    def batches(
        self,
        batch_size: int,
        seed: int,
        position: JsonObject | None = None,
        shuffle_window: int = 0,
    ) -> Iterator[Batch]:
        """Batches to train on, from the start or from the position after a batch.

        Args:
            shuffle_window: the number of blocks of a stream that are put in random order together,
                rounded up to whole batches; 0 keeps the order of the text. A text in memory is
                always in random order.

        Raises:
            TextRanOutError: a stream has no further batch.
        """

    def blocks(self) -> Iterator[Int[Tensor, " seq"]]:
        """Every block once, in the order of the text."""

    def shuffled(self) -> Iterator[Int[Tensor, " seq"]]:
        """Every block once, in a fixed random order: the first ones stand for the whole text.

        A stream keeps its order.
        """
