"""KL(model ‖ lens) and its gradient, without an array of logits per layer.

Write the logits as z = W n + b, with n the normed state, and A(n) = log Σ_v exp z_v for their
log-normaliser, whose gradient is the mean row E_q[W] under the softmax q. Then, for the model's
normed final state m with softmax p,

    KL(p ‖ q) = A(n) − A(m) − ⟨E_p[W], n − m⟩,

and its gradient in n is E_q[W] − E_p[W]. The terms that depend on the model, the vector E_p[W]
and one scalar per token, are computed once for all layers (`ModelSide`). The lens's terms,
E_q[W] and A(n), are softmax attention with query n and the rows of W as keys and values. They
are computed with torch's attention kernel or with two matrix products and a softmax in between,
over the whole vocabulary or over a sample of it (`tunedlens.engine.vocab_sample`).
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.config import Kernel
from tunedlens.engine.decoding import Workspace, chunk_tokens, max_chunk_tokens
from tunedlens.engine.keys import Keys, make_keys, upcast
from tunedlens.engine.vocab_sample import VocabSample
from tunedlens.lenses import AffineLens
from tunedlens.model import Unembedding


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on any device."""
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class ModelSide(NamedTuple):
    """The terms of the KL that depend on the model's distribution p only, for every token."""

    mean_row: Float[Tensor, "tokens d_model"]
    """E_p[W]: the mean row of the unembedding under p."""
    offset: Float[Tensor, " tokens"]
    """A(m) − ⟨E_p[W], m⟩, in nats. KL(p ‖ q) is A(n) − ⟨E_p[W], n⟩ minus this offset."""


class LensKL:
    """KL(model ‖ lens) of every layer, in nats, and its gradient.

    A call returns one mean per layer that is differentiable in the translated states, so any
    optimizer can use it. Training calls the parts instead: `keys` once per step, `model_side`
    once per token and `gradient` once per layer.

    The instance holds one copy of the unembedding in `dtype`. When memory runs out, it halves
    the chunk, warns and goes on.

    Args:
        unembedding: pass `Unembedding.centred()`, which has the same softmax and keeps the
            logits near 0, where half precision is accurate.
        dtype: the dtype of the matrix products and of their results. Sums over them are taken
            in float32, or in float64 if the unembedding is.
        kernel: `products` computes a chunk of logits, takes the softmax in place and multiplies
            again; `attention` calls torch's flash attention kernel for CPUs, which holds no
            logits.
        chunk: the number of tokens whose logits over the whole vocabulary are held at a time;
            `chunk_tokens` by default.
    """

    def __init__(
        self,
        unembedding: Unembedding,
        *,
        dtype: torch.dtype = torch.float32,
        kernel: Kernel = "products",
        chunk: int | None = None,
    ) -> None:
        weight = unembedding.weight
        self.chunk = chunk or chunk_tokens(len(weight), weight.device)
        self.dtype = dtype
        self._attend = _attention if kernel == "attention" else self._two_products
        self._norm, self._bias = unembedding.norm, unembedding.bias
        self._all_keys = make_keys(weight.to(dtype), self._bias)
        self._workspace = Workspace(self._all_keys.rows)

    def __call__(
        self,
        translated: Float[Tensor, "layers tokens d_model"],
        final: Float[Tensor, "tokens d_model"],
    ) -> Float[Tensor, " layers"]:
        """Mean KL of every layer, in nats.

        Args:
            translated: the translated states of each layer, before the final norm.
            final: the model's last state, before the final norm.
        """
        result: Tensor = _Function.apply(translated, self.model_side(final), self)
        return result

    def keys(self, sample: VocabSample | None = None) -> Keys:
        """The rows that the lens's softmax runs over: all of them, or a sample."""
        if sample is None:
            return self._all_keys
        offsets = -sample.log_inclusion
        if self._bias is not None:
            offsets = offsets + self._bias[sample.ids]
        rows = self._all_keys.rows[sample.ids, : self._all_keys.d_model]
        return make_keys(rows, offsets)

    @torch.no_grad()
    def model_side(
        self,
        final: Float[Tensor, "tokens d_model"],
        usage: Float[Tensor, " vocab"] | None = None,
    ) -> ModelSide:
        """The terms of the KL that depend on the model, over the whole vocabulary.

        Args:
            final: the model's last state, before the final norm.
            usage: if given, the squares of the model's probabilities, summed over tokens, are
                added to it. `draw_sample` computes its proposal from them.
        """
        keys, found = self._all_keys, []

        def measure(tokens: slice) -> None:
            normed = self._norm(final[tokens])
            query = keys.query(normed, None)
            if self.dtype.itemsize < 4:
                query = keys.query(normed, self._products(query, keys).amax(-1))
            mean_row, log_normaliser = self._two_products(query, keys)
            offset = log_normaliser + keys.shift_of(query) - _inner(mean_row, query)
            if usage is not None:
                probs = self._logits(len(query), keys)  # the softmax was taken in place
                squares = torch.mul(probs, probs, out=probs)
                usage.add_(squares.sum(0, dtype=usage.dtype))
            # The append comes last, so that a chunk that is repeated when memory runs out
            # counts once.
            found.append(ModelSide(mean_row, offset))

        self._in_chunks(len(final), keys, measure)
        return ModelSide(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @torch.no_grad()
    def kl(
        self, translated: Float[Tensor, "tokens d_model"], model: ModelSide
    ) -> Float[Tensor, " tokens"]:
        """KL of one layer at every token, in nats, at half the cost of the gradient.

        It is computed over the whole vocabulary, never estimated from a sample.
        """
        keys, kl = self._all_keys, torch.empty_like(model.offset)

        def measure(tokens: slice) -> None:
            part = ModelSide(*(value[tokens] for value in model))
            query, inner = _shifted_query(keys, self._norm(translated[tokens]), part)
            log_normaliser = self._softmax(query, keys)[1] + keys.shift_of(query)
            kl[tokens] = log_normaliser - inner - part.offset

        self._in_chunks(len(kl), keys, measure)
        return kl

    @torch.no_grad()
    def gradient(
        self,
        translated: Float[Tensor, "tokens d_model"],
        model: ModelSide,
        keys: Keys | None = None,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens d_model"]]:
        """KL of one layer at every token, in nats, and its gradient in the translated states.

        Args:
            translated: the translated states of the layer, before the final norm.
            model: from `model_side`, for the same tokens.
            keys: the keys of a sample, which make both results estimates; by default those of
                the whole vocabulary.
        """
        keys = keys or self._all_keys
        kl, gradient = torch.empty_like(model.offset), torch.empty_like(translated)

        def measure(tokens: slice) -> None:
            with torch.enable_grad():
                x = translated[tokens].detach().requires_grad_()
                normed = self._norm(x)
            part = ModelSide(*(value[tokens] for value in model))
            query, inner = _shifted_query(keys, normed.detach(), part)
            mean_row, log_normaliser = self._attend(query, keys)
            kl[tokens] = log_normaliser + keys.shift_of(query) - inner - part.offset
            grad_normed = (mean_row - part.mean_row).to(normed.dtype)
            (gradient[tokens],) = torch.autograd.grad(normed, x, grad_normed)

        self._in_chunks(len(kl), keys, measure)
        return kl, gradient

    def _two_products(self, query: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """E_q[W] and A(n), with the logits of a chunk in memory."""
        probs, log_normaliser = self._softmax(query, keys)
        return upcast(probs @ keys.rows[:, : keys.d_model]), log_normaliser

    def _softmax(self, query: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """Probabilities, in the workspace, and A(n)."""
        logits = self._products(query, keys)
        largest = upcast(logits.amax(-1))
        torch.softmax(logits, -1, out=logits)
        return logits, largest - upcast(logits.amax(-1)).log()

    def _products(self, query: Tensor, keys: Keys) -> Float[Tensor, "tokens rows"]:
        return torch.mm(query, keys.rows.T, out=self._logits(len(query), keys))

    def _logits(self, tokens: int, keys: Keys) -> Float[Tensor, "tokens rows"]:
        """The workspace that holds the logits of this many tokens."""
        return self._workspace.matrix(tokens, len(keys.rows))

    def _in_chunks(self, tokens: int, keys: Keys, measure: Callable[[slice], None]) -> None:
        device, rows = keys.rows.device, len(self._all_keys.rows)
        start = 0
        while start < tokens:
            # With the keys of a sample, a chunk of the same memory holds more tokens.
            count = max(1, min(self.chunk * rows // len(keys.rows), max_chunk_tokens(device)))
            try:
                measure(slice(start, start + count))
                start += count
                continue
            except RuntimeError as error:
                if self.chunk == 1 or not is_out_of_memory(error):
                    raise
            # Outside the except clause the exception no longer holds the chunk's tensors.
            self.chunk //= 2
            self._workspace.release()
            warnings.warn(
                f"out of memory: continuing with chunks of {self.chunk} tokens (longer ones for a "
                "sample of the vocabulary)",
                stacklevel=2,
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()


@torch.no_grad()
def accumulate_gradient(
    lens: AffineLens,
    states: Sequence[Float[Tensor, "tokens d_model"]],
    objective: LensKL,
    *,
    model: ModelSide | None = None,
    keys: Keys | None = None,
    layers: Sequence[int] | None = None,
    fraction: float = 1.0,
) -> Float[Tensor, " layers"]:
    """Add the gradient of the mean KL of every layer to the `grad` of its translator.

    The layers are processed one after the other, so the memory does not grow with their number.

    Args:
        states: all states of the residual stream, the last one before the final norm.
        model: from `objective.model_side`; computed if it is not given.
        keys: the keys of a sample of the vocabulary; by default those of all of it.
        layers: the layers that take part; all by default.
        fraction: the fraction of the step's tokens that is in `states`.

    Returns:
        The contribution of these tokens to the step's mean KL of every layer, in nats; 0 for
        layers that take no part.
    """
    model = model or objective.model_side(states[-1])
    kl = states[-1].new_zeros(lens.n_layers)
    for layer in range(lens.n_layers) if layers is None else layers:
        hidden, translator = states[layer], lens.translator(layer)
        nats, gradient = objective.gradient(lens.transform_hidden(hidden, layer), model, keys)
        factor = fraction / len(nats)
        kl[layer] = nats.sum() * factor
        dtype = objective.dtype
        weight_gradient = (gradient.T.to(dtype) @ hidden.to(dtype)).to(gradient.dtype)
        for parameter, value in (
            (translator.weight, weight_gradient),
            (translator.bias, gradient.sum(0)),
        ):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(value, alpha=factor)
    return kl


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, translated: Tensor, model: ModelSide, objective: LensKL) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return torch.stack([objective.kl(layer, model).mean() for layer in translated])
        found = [objective.gradient(layer, model) for layer in translated]
        ctx.save_for_backward(torch.stack([gradient for _, gradient in found]))
        return torch.stack([kl.mean() for kl, _ in found])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0][:, None, None] * gradient / gradient.shape[1], None, None


def _attention(query: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """E_q[W] and A(n) from torch's flash attention for CPUs, which holds no logits."""
    rows = keys.rows[None, None]
    # The public function does not return the log-sum-exp.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, log_normaliser = attend(query[None, None], rows, rows, scale=1.0)
    return upcast(output[0, 0, :, : keys.d_model]), upcast(log_normaliser.flatten())


def _shifted_query(
    keys: Keys, normed: Float[Tensor, "tokens d_model"], model: ModelSide
) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, " tokens"]]:
    """The query of a lens shifted by ⟨E_p[W], n⟩, which is near its largest logits, and that."""
    normed = normed.to(keys.rows.dtype)
    inner = _inner(model.mean_row, normed)
    return keys.query(normed, inner), inner


def _inner(mean_row: Tensor, query: Tensor) -> Float[Tensor, " tokens"]:
    """⟨E_p[W], n⟩ with the state rounded as in the products."""
    return torch.linalg.vecdot(mean_row, query[:, : mean_row.shape[1]].to(mean_row.dtype))
