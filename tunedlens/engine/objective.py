"""KL(model ‖ lens) and its gradient, without an array of logits per layer.

Write the logits as z = W n + b, with n the normed state, and A(n) = log Σ_v exp z_v for their
log-normaliser, whose gradient is the mean row E_q[W] under the softmax q. Then, for the model's
normed final state m with softmax p,

    KL(p ‖ q) = A(n) − A(m) − ⟨E_p[W], n − m⟩,

and its gradient in n is E_q[W] − E_p[W]. So a token's d_model numbers E_p[W] and one scalar are
all that the layers need of the model, and they are made once for all layers (`ModelSide`). The
lens's side, E_q[W] and A(n), is softmax attention with query n and the rows of W as keys and
values, or as two matrix products with a softmax in between; a sample of the rows estimates both
(`tunedlens.engine.vocab_sample`). Both formulas need logits that are linear in n: a model that
caps its logits takes the gradient q − p in the logits instead.
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
from tunedlens.lenses import AffineLens, Translator
from tunedlens.model import Unembedding


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever device."""
    # On a CPU it is a plain RuntimeError of the allocator.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class ModelSide(NamedTuple):
    """What the KL needs of the model's distribution p at every token, the same for all layers."""

    mean_row: Float[Tensor, "tokens d_model"]
    """E_p[W]: the mean row of the unembedding under p."""
    offset: Float[Tensor, " tokens"]
    """A(m) − ⟨E_p[W], m⟩, in nats: KL(p ‖ q) is A(n) − ⟨E_p[W], n⟩ less this."""


class LensKL:
    """KL(model ‖ lens) of every layer, in nats, and its gradient.

    Called with translated states it returns one mean per layer, differentiable in the
    translated states, so that any optimizer can use it. Training uses the parts:
    `model_side` once per token, `keys` once per step, `gradient` once per layer.

    Holds one copy of the unembedding, in `dtype`. When memory runs out, the chunk is halved with
    a warning and the work goes on.

    Args:
        unembedding: norm and unembedding; pass `Unembedding.centred()`, which leaves the
            softmax as it is and keeps the logits near 0, where half precision is fine.
        dtype: of the matrix products. Their results are rounded to it; what is made of them is
            added up in float32, or in float64 where the unembedding is.
        kernel: `products` multiplies, takes the softmax in place and multiplies again;
            `attention` calls the flash attention kernel that torch has for CPUs, which
            holds no logits.
        chunk: tokens whose logits over the whole vocabulary are held at a time; by default
            `chunk_tokens`.
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
            translated: what the lens makes of each layer's state, before the final norm.
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
        """What the layers need of the model's distribution, over the whole vocabulary.

        Args:
            final: the model's last state, before the final norm.
            usage: the squares of the model's probabilities, summed over tokens, are added to
                it; `draw_sample` makes its proposal of them.
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
            # Last, so that a chunk that is repeated for lack of memory counts once.
            found.append(ModelSide(mean_row, offset))

        self._in_chunks(len(final), keys, measure)
        return ModelSide(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @torch.no_grad()
    def kl(
        self, translated: Float[Tensor, "tokens d_model"], model: ModelSide
    ) -> Float[Tensor, " tokens"]:
        """KL of one layer at every token, in nats, at half the cost of the gradient.

        Over the whole vocabulary, never estimated from a sample.
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
            translated: what the lens makes of the layer's state, before the final norm.
            model: the model's side of the same tokens.
            keys: of a sample, which makes both results estimates; by default all.
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
            # Of a sample, more tokens have as many logits.
            count = max(1, min(self.chunk * rows // len(keys.rows), max_chunk_tokens(device)))
            try:
                measure(slice(start, start + count))
                start += count
                continue
            except RuntimeError as error:
                if self.chunk == 1 or not is_out_of_memory(error):
                    raise
            # Here the exception is gone, and with it its hold on the chunk's tensors.
            self.chunk //= 2
            self._workspace.release()
            warnings.warn(
                f"out of memory: going on with {self.chunk} tokens at a time (more of a sample)",
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
    share: float = 1.0,
) -> Float[Tensor, " layers"]:
    """Add the gradient of the KL, summed over layers, to that of the lens's translators.

    One layer at a time, so that more layers need no more memory.

    Args:
        lens: the lens whose translators get the gradient.
        states: all states of the residual stream, the last one before the final norm.
        objective: the KL.
        model: the model's side of these tokens, if it is known already.
        keys: of a sample of the vocabulary; by default all of it.
        layers: the layers that take part; all by default.
        share: the fraction of a whole step's tokens that these tokens are.

    Returns:
        Their part of the step's mean KL, in nats; 0 for layers that take no part.
    """
    model = model or objective.model_side(states[-1])
    kl = states[-1].new_zeros(lens.n_layers)
    for layer in range(lens.n_layers) if layers is None else layers:
        hidden, translator = states[layer], lens.translators[layer]
        assert isinstance(translator, Translator)
        nats, gradient = objective.gradient(lens.transform_hidden(hidden, layer), model, keys)
        factor = share / len(nats)
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
    """The query of a lens, and ⟨E_p[W], n⟩, which is near the logits that matter: its shift."""
    normed = normed.to(keys.rows.dtype)
    inner = _inner(model.mean_row, normed)
    return keys.query(normed, inner), inner


def _inner(mean_row: Tensor, query: Tensor) -> Float[Tensor, " tokens"]:
    """⟨E_p[W], n⟩ with the state as rounded for the products."""
    return torch.linalg.vecdot(mean_row, query[:, : mean_row.shape[1]].to(mean_row.dtype))
