"""KL(model || lens) and its exact gradient, a chunk of tokens at a time.

For logits z = W norm(x) with softmax q, and p the model's distribution, the gradient of
KL(p || q) in z is q - p. So one pass over a chunk gives both the loss and its gradient:
the model's p is made once and shared by all layers, nothing is kept for a backward pass
through the vocabulary, and memory is a few chunks of (tokens, vocab), whatever the number
of layers and tokens.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.frozen import Unembedding
from tunedlens.fused import Fused, is_out_of_memory
from tunedlens.metrics import kl_divergence


def reference_kl(
    translated: Float[Tensor, "layers tokens d_model"],
    final: Float[Tensor, "tokens d_model"],
    unembedding: Unembedding,
) -> Float[Tensor, " layers"]:
    """Mean KL(model || lens) of every layer, in nats, by its definition and autograd.

    Holds all logits of all layers at once. `LensKL` gives the same in a fraction of the
    memory and time; this is what it is held to.
    """
    model_logits = unembedding(final)
    return torch.stack(
        [kl_divergence(model_logits, unembedding(layer)).mean() for layer in translated]
    )


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time, a few times over.

    Enough that a product is worth its reading of the unembedding and an accelerator is
    busy; more would only take memory.
    """
    elements = 3 * 2**23 if device.type == "cpu" else 2**26
    return min(max(256, elements // vocab_size), 1024 if device.type == "cpu" else 8192)


class LensKL:
    """Mean KL(model || lens) of every layer, in nats, with its exact gradient.

    Called with translated states it returns one figure per layer, differentiable in the
    translated states, so that any optimiser can use it. Without a gradient to compute
    (`torch.no_grad`) it takes half the time.

    When memory runs out, the chunk is halved with a warning and the work goes on.

    Args:
        unembedding: norm and unembedding; pass `Unembedding.centred()`, which leaves the
            softmax as it is and keeps the logits near 0, where half precision is fine.
        dtype: of the matrix products; softmax and sums stay in float32, or in float64
            where the unembedding is.
        chunk: tokens at a time; by default `chunk_tokens`.
        compiled: fuse what lies between the products with `torch.compile`, which takes
            seconds once and then saves a good part of the time; where it fails, a warning
            is given and the same is done without.
    """

    def __init__(
        self,
        unembedding: Unembedding,
        *,
        dtype: torch.dtype = torch.float32,
        chunk: int | None = None,
        compiled: bool = False,
    ) -> None:
        vocab_size = unembedding.weight.shape[0]
        self.chunk = chunk or chunk_tokens(vocab_size, unembedding.weight.device)
        self._unembedding = unembedding
        self._weight = unembedding.weight.to(dtype)
        self._memory: tuple[Tensor, Tensor] | None = None
        self._model_side = Fused(_model_side, compiled)
        self._lens_side = Fused(_lens_side, compiled)

    def __call__(
        self,
        translated: Float[Tensor, "layers tokens d_model"],
        final: Float[Tensor, "tokens d_model"],
    ) -> Float[Tensor, " layers"]:
        """Mean KL of every layer, in nats.

        Args:
            translated: what the lens makes of each layer's state, before the final norm.
            final: the model's last state, before the final norm.
        """
        return _Function.apply(translated, final, self)

    def measure(
        self, translated: Tensor, final: Tensor, with_gradient: bool
    ) -> tuple[Float[Tensor, " layers"], Float[Tensor, "layers tokens d_model"] | None]:
        """The figures, and their gradient if it is asked for."""
        tokens = len(final)
        kl = translated.new_zeros(len(translated))
        gradient = torch.empty_like(translated) if with_gradient else None
        start = 0
        while start < tokens:
            part = slice(start, start + self.chunk)
            out = None if gradient is None else gradient[:, part]
            try:
                kl += self._measure_chunk(translated[:, part], final[part], out)
                start += self.chunk
                continue
            except RuntimeError as error:
                if self.chunk == 1 or not is_out_of_memory(error):
                    raise
            # Here the exception is gone, and with it its hold on the chunk's tensors.
            self.chunk //= 2
            self._memory = None
            warnings.warn(
                f"out of memory: going on with {self.chunk} tokens at a time", stacklevel=2
            )
            if translated.device.type == "cuda":
                torch.cuda.empty_cache()
        return kl / tokens, None if gradient is None else gradient.div_(tokens)

    def _measure_chunk(
        self, translated: Tensor, final: Tensor, gradient: Tensor | None
    ) -> Float[Tensor, " layers"]:
        """Summed KL of every layer over a chunk; writes its gradient into `gradient`."""
        norm, weight, bias = self._unembedding.norm, self._weight, self._unembedding.bias
        logits, model_probs = self._buffers(len(final))
        torch.mm(norm(final).to(weight.dtype), weight.T, out=logits)
        negative_entropy = self._model_side(logits, bias, model_probs)
        sums = []
        for layer, hidden in enumerate(translated.detach()):
            with torch.enable_grad():
                x = hidden.requires_grad_(gradient is not None)
                normed = norm(x)
            torch.mm(normed.detach().to(weight.dtype), weight.T, out=logits)
            with_gradient = gradient is not None
            kl = self._lens_side(logits, bias, model_probs, negative_entropy, with_gradient)
            sums.append(kl.sum())
            if gradient is not None:
                grad_normed = (logits @ weight).to(normed.dtype)  # they are q - p by now
                (gradient[layer],) = torch.autograd.grad(normed, x, grad_normed)
        return torch.stack(sums).to(translated.dtype)

    def _buffers(
        self, tokens: int
    ) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "tokens vocab"]]:
        """For logits and the model's probabilities, the same memory for every chunk and layer.

        On a CPU, memory that is new at every product costs as much as the softmax.
        """
        if self._memory is None or len(self._memory[0]) < tokens:
            shape, like = (tokens, len(self._weight)), self._weight
            sums = torch.promote_types(like.dtype, torch.float32)
            self._memory = (like.new_empty(shape), like.new_empty(shape, dtype=sums))
        logits, probs = self._memory
        return logits[:tokens], probs[:tokens]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, translated: Tensor, final: Tensor, objective: LensKL) -> Tensor:
        kl, gradient = objective.measure(translated, final, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0][:, None, None] * gradient, None, None


def _model_side(
    logits: Float[Tensor, "tokens vocab"],
    bias: Float[Tensor, " vocab"] | None,
    probs: Float[Tensor, "tokens vocab"],
) -> Float[Tensor, " tokens"]:
    """What all layers share: fills in `probs`, returns their negative entropy."""
    log_probs = _raised(logits, bias).log_softmax(-1)
    torch.exp(log_probs, out=probs)
    return torch.linalg.vecdot(probs, log_probs)


def _lens_side(
    logits: Float[Tensor, "tokens vocab"],
    bias: Float[Tensor, " vocab"] | None,
    probs: Float[Tensor, "tokens vocab"],
    negative_entropy: Float[Tensor, " tokens"],
    with_gradient: bool,
) -> Float[Tensor, " tokens"]:
    """KL of every token; turns `logits` into its gradient in them, q - p, if asked to."""
    log_probs = _raised(logits, bias).log_softmax(-1)
    kl = negative_entropy - torch.linalg.vecdot(probs, log_probs)
    if with_gradient:
        logits.copy_(log_probs.exp_().sub_(probs))
    return kl


def _raised(logits: Tensor, bias: Tensor | None) -> Tensor:
    """In the precision of sums, with the bias that few unembeddings have."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits + bias
