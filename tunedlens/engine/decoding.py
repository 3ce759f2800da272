"""States of the residual stream to logits, in memory that is reused."""

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.lenses import Lens, ResidualLens
from tunedlens.model import Unembedding


class Workspace:
    """One buffer for matrices that are computed, used and discarded.

    On a CPU, allocating the result of every product costs as much as the softmax.

    Args:
        like: a tensor with the dtype and device of the matrices.
    """

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0)

    def matrix(self, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        """A matrix with unspecified values, valid until the next call."""
        if self._memory.numel() < rows * columns:
            self._memory = self._memory.new_empty(rows * columns)
        return self._memory[: rows * columns].view(rows, columns)

    def release(self) -> None:
        """Free the memory."""
        self._memory = self._memory.new_empty(0)


class Decoder:
    """Decodes states with a lens, or with the model's own final norm and unembedding.

    Every result is a view of the same memory and is valid until the next one is computed.

    Args:
        unembedding: pass `Unembedding.centred()` if only the softmax matters, which keeps the
            logits near 0, or the model's own for raw logits.
    """

    def __init__(self, unembedding: Unembedding) -> None:
        self._norm, self._weight = unembedding.norm, unembedding.weight
        self._bias, self._cap = unembedding.bias, unembedding.cap
        self._workspace = Workspace(unembedding.weight)

    @torch.no_grad()
    def lens_logits(
        self, lens: Lens, hidden: Float[Tensor, "tokens d_model"], layer: int
    ) -> Float[Tensor, "tokens vocab"]:
        """Logits of a lens, computed with this decoder's unembedding."""
        if isinstance(lens, ResidualLens):
            return self.model_logits(lens.transform_hidden(hidden, layer))
        logits = self._workspace.matrix(len(hidden), len(self._weight))
        return logits.copy_(lens(hidden, layer))

    @torch.no_grad()
    def model_logits(
        self, hidden: Float[Tensor, "tokens d_model"]
    ) -> Float[Tensor, "tokens vocab"]:
        """Logits of states that the final norm reads."""
        logits = self._workspace.matrix(len(hidden), len(self._weight))
        torch.mm(self._norm(hidden.to(self._weight.dtype)), self._weight.T, out=logits)
        if self._bias is not None:
            logits.add_(self._bias)
        return logits if self._cap is None else logits.div_(self._cap).tanh_().mul_(self._cap)


def chunk_tokens(rows: int, device: torch.device) -> int:
    """The number of tokens whose logits are held at a time.

    It is large enough to amortise reading the unembedding and to keep a GPU busy. A larger
    chunk would take more memory and, on a CPU, leave its caches.

    Args:
        rows: the number of rows of the unembedding, or of a sample of it.
        device: where the products run.
    """
    elements = 3 * 2**23 if device.type == "cpu" else 2**26
    return min(max(256, elements // rows), max_chunk_tokens(device))


def max_chunk_tokens(device: torch.device) -> int:
    """The largest chunk, however few rows there are."""
    return 1024 if device.type == "cpu" else 8192
