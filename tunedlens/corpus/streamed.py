"""A corpus that is read while it is used."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens.corpus.blocks import Batch, TextRanOutError
from tunedlens.corpus.documents import DOCUMENTS_AT_A_TIME, Document, Packer, encode_texts
from tunedlens.corpus.standard_library import HELD_OUT_FRACTION, hash_fraction
from tunedlens.errors import InputError, first_line
from tunedlens.files import JsonObject

if TYPE_CHECKING:
    from datasets import IterableDataset

_NOTHING_READ = {"documents": 0, "bytes": 0, "tokens": 0}


class StreamedCorpus:
    """Blocks that are made while the text is read, in the order of the text.

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
        seed: int,  # noqa: ARG002 - a stream keeps the order of its text
        position: JsonObject | None = None,
    ) -> Iterator[Batch]:
        needed = batch_size * self._packer.text_tokens
        # A position consists of the reader's state before the last run of documents, the tokens
        # left over from earlier runs, and the number of batches since then.
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
                rows = self._packer.to_blocks(stream[index * needed : (index + 1) * needed])
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
            blocks = self._packer.to_blocks(stream)
            yield from blocks.long()
            stream = stream[len(blocks) * self._packer.text_tokens :]
        self.about["dropped_tokens"] = len(stream)

    def _runs(self) -> Iterator[list[Document]]:
        """The documents of this split, a few at a time.

        Raises:
            InputError: reading the text fails.
        """
        runs = self._documents.iter(DOCUMENTS_AT_A_TIME)
        while True:
            try:
                rows = next(runs)
            except StopIteration:
                return
            except Exception as error:  # datasets raises many kinds of exception
                raise InputError(
                    f"cannot read on in {self.about['dataset']}: {first_line(error)}"
                ) from error
            texts = [
                text
                for text in rows["text"]
                if text and self._held_out in (None, hash_fraction(text) < HELD_OUT_FRACTION)
            ]
            yield encode_texts(texts, self._packer)
