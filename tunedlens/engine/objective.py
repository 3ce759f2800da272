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
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tunedlens.config import Kernel
from tunedlens.engine.decoding import chunk_tokens, max_chunk_tokens
from tunedlens.engine.vocab_sample import VocabSample
from tunedlens.lenses import AffineLens
from tunedlens.model import Unembedding

States = Float[Tensor, "tokens d_model"]
PerToken = Float[Tensor, " tokens"]
Keys = Float[Tensor, "rows width"]
"""The rows that a softmax runs over. Each has a row of the unembedding, a 1 for the shift of the
query and, if rows have offsets, two columns for the offset. Columns of zeros and rows with the
probability 0 are added up to a multiple of 8, because GPUs multiply such sizes faster."""

_MULTIPLE = 8
_NO_PROBABILITY = -1e30
"""The offset of a row without a token. bfloat16 can represent it too."""


class ModelSide(NamedTuple):
    """The terms of the KL that depend on the model's distribution p only, for every token."""

    mean_row: States
    """E_p[W]: the mean row of the unembedding under p."""
    offset: PerToken
    """A(m) − ⟨E_p[W], m⟩, in nats. KL(p ‖ q) is A(n) − ⟨E_p[W], n⟩ minus this offset."""

    @classmethod
    def of_no_tokens(cls, d_model: int, device: torch.device) -> Self:
        """The terms for an empty set of tokens."""
        return cls(torch.empty(0, d_model, device=device), torch.empty(0, device=device))


class LensKL:
    """KL(model ‖ lens) of every layer, in nats, and its gradient.

    All states are given before the final norm. A call returns one mean per layer that is
    differentiable in the translated states, so any optimizer can use it. Training calls the
    parts instead: `keys` once per step, `model_side` once per token, `gradient` once per layer.

    The instance holds one copy of the unembedding in `dtype`. When memory runs out, it halves
    the chunk, warns and continues.

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
        self._attend = self._attention if kernel == "attention" else self._two_products
        self._norm, self._bias, self._d_model = unembedding.norm, unembedding.bias, weight.shape[1]
        self._all_keys = _make_keys(weight.to(dtype), self._bias)
        # One tensor for all logits: on a CPU, allocating them costs as much as the softmax.
        self._logits = self._all_keys.new_empty(0)

    def __call__(
        self, translated: Float[Tensor, "layers tokens d_model"], final: States
    ) -> Float[Tensor, " layers"]:
        """Mean KL of every layer, in nats, for the model's last state `final`."""
        model, means = self.model_side(final), []
        for states in translated:
            kl, gradient = self.gradient(states.detach(), model)
            # The second term is 0 and carries the gradient.
            carrier = ((states - states.detach()) * gradient).sum()
            means.append(kl.mean() + carrier / len(kl))
        return torch.stack(means)

    def keys(self, sample: VocabSample | None = None) -> Keys:
        """The keys of the whole vocabulary, or those of a sample."""
        if sample is None:
            return self._all_keys
        offsets = -sample.log_inclusion
        if self._bias is not None:
            offsets = offsets + self._bias[sample.ids]
        return _make_keys(self._all_keys[sample.ids, : self._d_model], offsets)

    @torch.no_grad()
    def model_side(self, final: States, usage: Float[Tensor, " vocab"] | None = None) -> ModelSide:
        """The terms of the KL that depend on the model, over the whole vocabulary.

        Args:
            final: the model's last state.
            usage: if given, the squares of the model's probabilities, summed over tokens, are
                added to it. `draw_sample` computes its proposal from them.
        """
        keys, dtype = self._all_keys, torch.promote_types(self.dtype, torch.float32)
        mean_rows = final.new_empty(len(final), self._d_model, dtype=dtype)
        offsets = final.new_empty(len(final), dtype=dtype)

        def measure(tokens: slice) -> None:
            normed = self._norm(final[tokens])
            query = self._query(normed, keys)
            if self.dtype.itemsize < 4:
                query = self._query(normed, keys, shift=self._products(query, keys).amax(-1))
            mean_row, log_normaliser = self._two_products(query, keys)
            mean_rows[tokens] = mean_row
            offsets[tokens] = log_normaliser - _inner(mean_row, query[:, : self._d_model])
            if usage is not None:
                # The softmax was taken in place. The sum comes last, so that a chunk that is
                # repeated when memory runs out counts once.
                squares = self._logits.mul_(self._logits).sum(0, dtype=usage.dtype)
                usage.add_(squares[: len(usage)])

        self._in_chunks(len(final), keys, measure)
        return ModelSide(mean_rows, offsets)

    @torch.no_grad()
    def kl(self, translated: States, model: ModelSide) -> PerToken:
        """KL of one layer at every token, in nats, at half the cost of the gradient.

        It is computed over the whole vocabulary, never estimated from a sample.
        """
        keys, kl = self._all_keys, torch.empty_like(model.offset)

        def measure(tokens: slice) -> None:
            normed = self._norm(translated[tokens]).to(keys.dtype)
            inner = _inner(model.mean_row[tokens], normed)
            log_normaliser = self._softmax(self._query(normed, keys, inner), keys)[1]
            kl[tokens] = log_normaliser - inner - model.offset[tokens]

        self._in_chunks(len(kl), keys, measure)
        return kl

    @torch.no_grad()
    def gradient(
        self, translated: States, model: ModelSide, keys: Keys | None = None
    ) -> tuple[PerToken, States]:
        """KL of one layer at every token, in nats, and its gradient in the translated states.

        Args:
            translated: the translated states of the layer.
            model: the result of `model_side` for the same tokens.
            keys: the keys of a sample, which make both results estimates; by default those of
                the whole vocabulary.
        """
        rows = self._all_keys if keys is None else keys
        kl, gradient = torch.empty_like(model.offset), torch.empty_like(translated)

        def measure(tokens: slice) -> None:
            with torch.enable_grad():
                x = translated[tokens].detach().requires_grad_()
                normed = self._norm(x)
            rounded = normed.detach().to(rows.dtype)
            inner = _inner(model.mean_row[tokens], rounded)
            mean_row, log_normaliser = self._attend(self._query(rounded, rows, inner), rows)
            kl[tokens] = log_normaliser - inner - model.offset[tokens]
            grad_normed = (mean_row - model.mean_row[tokens]).to(normed.dtype)
            (gradient[tokens],) = torch.autograd.grad(normed, x, grad_normed)

        self._in_chunks(len(kl), rows, measure)
        return kl, gradient

    def _query(
        self, normed: States, keys: Keys, shift: PerToken | None = None
    ) -> Float[Tensor, "tokens width"]:
        """Queries whose products with the keys are the logits minus the shift.

        A shift near the largest logit, such as ⟨E_p[W], n⟩, keeps the largest logits near 0,
        where half precision is accurate. The shift itself is rounded to that precision.
        """
        query = normed.new_ones(len(normed), keys.shape[1], dtype=keys.dtype)
        query[:, : self._d_model] = normed
        query[:, self._d_model] = 0 if shift is None else -shift
        return query

    def _attention(self, query: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """E_q[W] and A(n) from torch's flash attention for CPUs, which holds no logits."""
        rows = keys[None, None]
        # The public function does not return the log-sum-exp.
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, log_normaliser = attend(query[None, None], rows, rows, scale=1.0)
        mean_row, shift = output[0, 0, :, : self._d_model], -query[:, self._d_model]
        return _upcast(mean_row), _upcast(log_normaliser.flatten()) + _upcast(shift)

    def _two_products(self, query: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """E_q[W] and A(n), with the logits of a chunk in memory."""
        probs, log_normaliser = self._softmax(query, keys)
        return _upcast(probs @ keys[:, : self._d_model]), log_normaliser

    def _softmax(self, query: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """Probabilities, which are valid until the next products, and A(n)."""
        logits, shift = self._products(query, keys), -query[:, self._d_model]
        largest = _upcast(logits.amax(-1))
        probs = torch.softmax(logits, -1, out=logits)
        return probs, largest - _upcast(probs.amax(-1)).log() + _upcast(shift)

    def _products(self, query: Tensor, keys: Keys) -> Float[Tensor, "tokens rows"]:
        return torch.mm(query, keys.T, out=self._logits.resize_(len(query), len(keys)))

    def _in_chunks(self, tokens: int, keys: Keys, measure: Callable[[slice], None]) -> None:
        start = 0
        while start < tokens:
            # With the keys of a sample, a chunk of the same memory holds more tokens.
            count = self.chunk * len(self._all_keys) // len(keys)
            count = max(1, min(count, max_chunk_tokens(keys.device)))
            try:
                measure(slice(start, start + count))
                start += count
                continue
            except RuntimeError as error:
                # The CPU allocator raises a plain RuntimeError.
                is_out_of_memory = isinstance(error, torch.OutOfMemoryError) or (
                    "can't allocate memory" in str(error)
                )
                if self.chunk == 1 or not is_out_of_memory:
                    raise
            # Outside the except clause the exception no longer holds the chunk's tensors.
            self.chunk //= 2
            self._logits = self._all_keys.new_empty(0)
            warnings.warn(
                f"out of memory: continuing with chunks of {self.chunk} tokens (longer ones for a "
                "sample of the vocabulary)",
                stacklevel=2,
            )
            if keys.device.type == "cuda":
                torch.cuda.empty_cache()


@torch.no_grad()
def accumulate_gradient(
    lens: AffineLens,
    states: Sequence[States],
    objective: LensKL,
    *,
    model: ModelSide | None = None,
    keys: Keys | None = None,
    layers: Sequence[int] | None = None,
    fraction: float = 1.0,
) -> Float[Tensor, " layers"]:
    """Add the gradient of the mean KL of every layer to the `grad` of its translator.

    The layers are processed one after the other, or a few at a time if they have few tokens, so
    the memory does not grow with their number.

    Args:
        states: the states at `lens.points`, and last the one before the final norm.
        model: the result of `objective.model_side`; it is computed if it is not given.
        keys: the keys of a sample of the vocabulary; by default those of the whole vocabulary.
        layers: the indices of the points that take part; all by default.
        fraction: the fraction of the step's tokens that is in `states`.

    Returns:
        The contribution of these tokens to the step's mean KL at every point, in nats; 0 for
        points that take no part.
    """
    model, points = model or objective.model_side(states[-1]), lens.points
    tokens, dtype = len(states[-1]), objective.dtype
    kl, factor = states[-1].new_zeros(len(points)), fraction / tokens
    left = list(range(len(points)) if layers is None else layers)
    together = max(1, max_chunk_tokens(states[-1].device) // tokens)
    while left:
        group, left = left[:together], left[together:]
        translated = [
            lens.transform_hidden(states[index], points[index].layer, points[index].site)
            for index in group
        ]
        same = ModelSide(model.mean_row.repeat(len(group), 1), model.offset.repeat(len(group)))
        nats, gradients = objective.gradient(torch.cat(translated), same, keys)
        for index, own, gradient in zip(
            group, nats.split(tokens), gradients.split(tokens), strict=True
        ):
            kl[index] = own.sum() * factor
            translator = lens.translator(points[index].layer, points[index].site)
            weight = (gradient.T.to(dtype) @ states[index].to(dtype)).to(gradient.dtype)
            for parameter, value in zip(
                translator.parameters(), (weight, gradient.sum(0)), strict=True
            ):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(value, alpha=factor)
    return kl


def _make_keys(
    weight: Float[Tensor, "rows d_model"], offsets: Float[Tensor, " rows"] | None
) -> Keys:
    """Append the column of ones and the offsets, each as its rounded value and the remainder."""
    if missing := -len(weight) % _MULTIPLE:
        offsets = weight.new_zeros(len(weight)) if offsets is None else offsets
        offsets = F.pad(offsets, (0, missing), value=_NO_PROBABILITY)
        weight = F.pad(weight, (0, 0, 0, missing))
    columns = [weight, weight.new_ones(len(weight), 1)]
    if offsets is not None:
        rounded = offsets.to(weight.dtype)
        columns += [rounded[:, None], (offsets - rounded).to(weight.dtype)[:, None]]
    width = weight.shape[1] + len(columns) - 1
    columns.append(weight.new_zeros(len(weight), -width % _MULTIPLE))
    return torch.cat(columns, 1)


def _inner(mean_row: States, rounded: States) -> PerToken:
    """⟨E_p[W], n⟩ with the same rounded state as in the products."""
    return torch.linalg.vecdot(mean_row, rounded.to(mean_row.dtype))


def _upcast(values: Tensor) -> Tensor:
    """Convert to the dtype of accumulation: float32, or float64 for values in float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
