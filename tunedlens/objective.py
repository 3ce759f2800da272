"""KL(model || lens) and its exact gradient, a chunk of tokens at a time.

For logits z = W norm(x) with softmax q, and p the model's distribution, the gradient of
KL(p || q) in z is q - p. So one pass over a chunk gives both the loss and its gradient:
the model's p is made once and shared by all layers, nothing is kept for a backward pass
through the vocabulary, and memory is a few chunks of (tokens, vocab), whatever the number
of layers and tokens.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.frozen import Unembedding


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time, a few times over.

    Few enough that a CPU's caches hold them, many enough that an accelerator is busy, and
    on either enough that a product is worth its reading of the unembedding.
    """
    elements = 2**20 if device.type == "cpu" else 2**26
    return max(256, elements // vocab_size)


def lens_kl(
    translated: Float[Tensor, "layers tokens d_model"],
    final: Float[Tensor, "tokens d_model"],
    unembedding: Unembedding,
    *,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Float[Tensor, " layers"]:
    """Mean KL(model || lens) of every layer, in nats, with its gradient in `translated`.

    Args:
        translated: what the lens makes of each layer's state, before the final norm.
        final: the model's last state, before the final norm.
        unembedding: norm and unembedding; pass `Unembedding.centred()`, which leaves the
            softmax as it is and keeps the logits near 0.
        dtype: of the matrix products; softmax and sums stay in float32.
        chunk: tokens at a time; by default `chunk_tokens`.
    """
    chunk = chunk or chunk_tokens(unembedding.weight.shape[0], translated.device)
    return _LensKL.apply(translated, final, unembedding, dtype, chunk)


class _LensKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        translated: Tensor,
        final: Tensor,
        unembedding: Unembedding,
        dtype: torch.dtype,
        chunk: int,
    ) -> Tensor:
        layers, tokens, _ = translated.shape
        weight = unembedding.weight.to(dtype)
        bias = unembedding.bias
        kl = torch.zeros(layers, dtype=translated.dtype, device=translated.device)
        gradient = torch.empty_like(translated)

        def logits(normed: Tensor) -> Tensor:
            product = (normed.to(dtype) @ weight.T).to(translated.dtype)
            return product if bias is None else product.add_(bias)

        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            model_log_probs = logits(unembedding.norm(final[part])).log_softmax(-1)
            model_probs = model_log_probs.exp()
            negative_entropy = (model_probs * model_log_probs).sum()
            for layer in range(layers):
                with torch.enable_grad():
                    x = translated[layer, part].detach().requires_grad_()
                    normed = unembedding.norm(x)
                z = logits(normed.detach())
                log_normaliser = z.logsumexp(-1, keepdim=True)
                kl[layer] += negative_entropy + log_normaliser.sum() - (model_probs * z).sum()
                q_minus_p = z.sub_(log_normaliser).exp_().sub_(model_probs)
                grad_normed = (q_minus_p.to(dtype) @ weight).to(x.dtype)
                (gradient[layer, part],) = torch.autograd.grad(normed, x, grad_normed)
        ctx.save_for_backward(gradient.div_(tokens))
        return kl / tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0][:, None, None] * gradient, None, None, None, None
