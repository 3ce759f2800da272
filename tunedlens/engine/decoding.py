"""Decodes states of the residual stream to logits, in memory that is reused."""

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.lenses import Lens, ResidualLens
from tunedlens.model import Unembedding


class Decoder:
    """Decodes states with a lens, or with the model's own final norm and unembedding.

    All results share one tensor, so each is valid until the next one is computed. On a CPU,
    allocating the result of every product costs as much as the softmax.

    Args:
        unembedding: pass `Unembedding.centred()` if only the softmax matters, which keeps the
            logits near 0, or the model's own for raw logits.
    """

    def __init__(self, unembedding: Unembedding) -> None:
        self._unembedding = unembedding
        self._logits = unembedding.weight.new_empty(0)

    @torch.no_grad()
    def lens_logits(
        self,
        lens: Lens,
        hidden: Float[Tensor, "tokens d_model"],
        layer: int,
        site: str = "resid_pre",
    ) -> Float[Tensor, "tokens vocab"]:
        """Logits of a lens, computed with this decoder's unembedding."""
        if isinstance(lens, ResidualLens):
            return self.model_logits(lens.transform_hidden(hidden, layer, site))
        logits = lens(hidden, layer, site)
        return self._logits.resize_(logits.shape).copy_(logits)

    @torch.no_grad()
    def model_logits(
        self, hidden: Float[Tensor, "tokens d_model"]
    ) -> Float[Tensor, "tokens vocab"]:
        """Logits of states before the final norm."""
        weight, bias = self._unembedding.weight, self._unembedding.bias
        normed = self._unembedding.norm(hidden.to(weight.dtype))
        logits = self._logits.resize_(len(hidden), len(weight))
        torch.mm(normed, weight.T, out=logits)
        if bias is not None:
            logits.add_(bias)
        cap = self._unembedding.cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def chunk_tokens(rows: int, device: torch.device) -> int:
    """The number of tokens whose logits are held at a time.

    It is large enough to amortise reading the unembedding and to keep a GPU busy. A larger
    chunk would take more memory and, on a CPU, leave its caches.

    Args:
        rows: the number of rows of the unembedding, or of a sample of it.
        device: where the products run.
    """
    elements = 3 * 2**23 if device.type == "cpu" else 2**27
    return min(max(256, elements // rows), max_chunk_tokens(device))


def max_chunk_tokens(device: torch.device) -> int:
    """The largest number of tokens in a chunk, for any number of rows."""
    return 1024 if device.type == "cpu" else 32_768
