"""A corpus that is read while a run uses it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens.corpus.blocks import Batch, TextRanOutError
from tunedlens.corpus.documents import DOCUMENTS_AT_A_TIME, Packer, tokenised
from tunedlens.corpus.standard_library import HELD_OUT_FRACTION, hash_fraction
from tunedlens.errors import InputError, first_line
from tunedlens.files import JsonObject

if TYPE_CHECKING:
    from datasets import IterableDataset

_START: JsonObject = {
    "reader": None,
    "left": [],
    "window": 0,
    "batches": 0,
    "read": {"documents": 0, "bytes": 0, "tokens": 0},
}


class StreamedCorpus:
    """Blocks that are made while the text is read.

    Args:
        documents: rows with a column `text`.
        name: the name of the text in messages.
        held_out: whether to keep the validation or the training documents of the split by hash;
            None keeps every document.
    """

    def __init__(
        self,
        documents: "IterableDataset",
        packer: Packer,
        name: str,
        held_out: bool | None,
    ) -> None:
        self._documents = documents
        self._packer = packer
        self._held_out = held_out
        self.about: JsonObject = {"dataset": name, "streamed": True}

    def batches(
        self,
        batch_size: int,
        seed: int,
        position: JsonObject | None = None,
        shuffle_window: int = 0,
    ) -> Iterator[Batch]:
        in_window = max(1, -(-shuffle_window // batch_size))
        needed = in_window * batch_size * self._packer.text_tokens
        # A position consists of the reader's state before the first run of documents that is not
        # used up, the tokens left over from earlier runs, the number of windows before these, and
        # the number of batches since then.
        start = _START | (position or {})
        if start["reader"] is not None:
            self._documents.load_state_dict(start["reader"])
        stream, read = torch.tensor(start["left"], dtype=torch.int32), start["read"]

        def from_start(tokens: Int[Tensor, " tokens"], window: int) -> Iterator[Batch]:
            """The batches of a window that come after the position."""
            blocks = self._packer.to_blocks(tokens)
            if shuffle_window:
                blocks = blocks[_order(len(blocks), seed, start["window"] + window)]
            firsts = range(0, len(blocks), batch_size)
            for index, first in enumerate(firsts, window * in_window + 1):
                if index > start["batches"]:
                    rows = blocks[first : first + batch_size]
                    yield Batch(rows.long(), start | {"batches": index})

        for run in tokenised(self._texts(), self._packer, self.about["dataset"]):
            stream = torch.cat([stream, *(document.ids for document in run)])
            read = {
                "documents": read["documents"] + len(run),
                "bytes": read["bytes"] + sum(d.text_bytes for d in run),
                "tokens": read["tokens"] + sum(len(d.ids) for d in run),
            }
            self.about |= read
            windows = len(stream) // needed
            for window in range(windows):
                yield from from_start(stream[window * needed : (window + 1) * needed], window)
            if windows:
                stream = stream[windows * needed :]
                start = {
                    "reader": self._documents.state_dict(),
                    "left": stream.tolist(),
                    "window": start["window"] + windows,
                    # Several processes read more at a time, so a continued run may skip batches.
                    "batches": max(0, start["batches"] - windows * in_window),
                    "read": read,
                }
        per_batch = batch_size * self._packer.text_tokens
        rest = len(stream) % per_batch
        yield from from_start(stream[: len(stream) - rest], 0)
        raise TextRanOutError(
            f"the text {self.about['dataset']} ran out: {rest} tokens are left and a batch "
            f"needs {per_batch}; ask for fewer --tokens or give more text"
        )

    def shuffled(self) -> Iterator[Int[Tensor, " seq"]]:
        return self.blocks()

    def blocks(self) -> Iterator[Int[Tensor, " seq"]]:
        stream = torch.tensor([], dtype=torch.int32)
        for run in tokenised(self._texts(), self._packer, self.about["dataset"]):
            stream = torch.cat([stream, *(document.ids for document in run)])
            blocks = self._packer.to_blocks(stream)
            yield from blocks.long()
            stream = stream[len(blocks) * self._packer.text_tokens :]
        self.about["dropped_tokens"] = len(stream)

    def _texts(self) -> Iterator[list[str]]:
        """The texts of this split, a few at a time.

        Raises:
            InputError: reading fails.
        """
        runs = self._documents.iter(DOCUMENTS_AT_A_TIME)
        while True:
            try:
                rows = next(runs)
            except StopIteration:
                return
            except Exception as error:  # datasets raises many kinds of exception
                raise InputError(
                    f"cannot continue to read {self.about['dataset']}: {first_line(error)}"
                ) from error
            yield [
                text
                for text in rows["text"]
                if text and self._held_out in (None, hash_fraction(text) < HELD_OUT_FRACTION)
            ]


def _order(blocks: int, seed: int, window: int) -> Int[Tensor, " blocks"]:
    """The random order of the blocks of a window."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + window)
    return torch.randperm(blocks, generator=generator)
