"""A corpus in memory.

Its blocks depend only on the text and the tokenizer, and a batch depends only on the seed and its
index. The number of workers and processes changes neither.
"""

import hashlib
from collections.abc import Iterator
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens.corpus.blocks import Batch
from tunedlens.corpus.documents import Document, Packer, hold_out
from tunedlens.corpus.standard_library import hash_fraction
from tunedlens.errors import InputError
from tunedlens.files import JsonObject


class PackedCorpus:
    """Blocks in memory. Every pass over them has a new random order.

    Args:
        blocks: the blocks, in the order of the text.
        about: describes the text.
    """

    def __init__(self, blocks: Int[Tensor, "blocks seq"], about: JsonObject) -> None:
        self._blocks = blocks
        self.about = about | {"blocks": len(blocks)}

    @classmethod
    def pack(cls, documents: list[Document], packer: Packer, name: str) -> Self:
        """Join documents and cut them into blocks.

        Raises:
            InputError: there is less than one block.
        """
        if not documents:
            raise InputError(f"{name} is empty: expected text")
        stream = torch.cat([document.ids for document in documents])
        blocks = packer.to_blocks(stream)
        if not len(blocks):
            raise InputError(
                f"{name} has {len(stream)} tokens, less than one block of {packer.seq_len}; "
                "give more text or a smaller --seq-len"
            )
        about = {
            "dataset": name,
            "documents": len(documents),
            "bytes": sum(document.text_bytes for document in documents),
            "tokens": len(stream),
            "dropped_tokens": len(stream) % packer.text_tokens,
            "tokens_sha256": hashlib.sha256(stream.numpy().data).hexdigest(),
        }
        return cls(blocks, about)

    def split(self) -> tuple["PackedCorpus", "PackedCorpus"]:
        """The blocks to train on and those held out, by the hash of each.

        Raises:
            InputError: there are not two blocks, one for each split.
        """
        if len(self._blocks) < 2:
            raise InputError(
                f"{self.about['dataset']} is one block of {self._blocks.shape[1]} tokens; expected "
                "at least two, one to train on and one to hold out: give more text or a smaller "
                "--seq-len"
            )
        held_out = torch.tensor(
            hold_out([hash_fraction(block.numpy().tobytes()) for block in self._blocks])
        )
        return (
            PackedCorpus(self._blocks[~held_out], self.about),
            PackedCorpus(self._blocks[held_out], self.about),
        )

    def batches(
        self,
        batch_size: int,
        seed: int,
        position: JsonObject | None = None,
        shuffle_window: int = 0,  # noqa: ARG002 - the order of all blocks is random
    ) -> Iterator[Batch]:
        count = len(self._blocks)
        order, shuffled_epoch = torch.arange(0), -1
        index = 0 if position is None else position["batch"]
        while True:
            rows = []
            for row in range(index * batch_size, (index + 1) * batch_size):
                epoch = row // count
                if epoch != shuffled_epoch:
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                    order, shuffled_epoch = torch.randperm(count, generator=generator), epoch
                rows.append(self._blocks[order[row % count]])
            index += 1
            yield Batch(torch.stack(rows).long(), {"batch": index})

    def blocks(self) -> Iterator[Int[Tensor, " seq"]]:
        yield from self._blocks.long()

    def shuffled(self) -> Iterator[Int[Tensor, " seq"]]:
        generator = torch.Generator().manual_seed(0)
        yield from self._blocks[torch.randperm(len(self._blocks), generator=generator)].long()
