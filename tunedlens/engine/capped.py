"""KL(model ‖ lens) and its gradient for a model that caps its logits, such as Gemma 2.

With z = W n + b the logits are c tanh(z / c), so the KL is no longer a function of E_p[W] and
log-normalisers only, and the mean row cannot be subtracted from W. Here the distributions of
model and lens are both computed for every layer. The gradient in n is W's transpose times

    (q − p) (1 − tanh²(z / c)).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.config import Kernel
from tunedlens.engine.objective import Keys, LensKL, ModelSide, PerToken, States
from tunedlens.model import Unembedding


class CappedLensKL(LensKL):
    """`LensKL` for an unembedding with a cap: exact, in the dtype of the unembedding.

    Each token and layer costs three matrix products: for the model, for the lens, for the gradient.
    """

    def __init__(self, unembedding: Unembedding, *, chunk: int | None = None) -> None:
        assert unembedding.cap is not None
        super().__init__(unembedding, dtype=unembedding.weight.dtype, chunk=chunk)
        self._cap = unembedding.cap
        # A cap bounds the logits, so padding rows would get some probability. They are left out.
        self._all_keys = self._all_keys[: len(unembedding.weight)]

    @torch.no_grad()
    def model_side(
        self,
        final: States,
        usage: Float[Tensor, " vocab"] | None = None,
    ) -> ModelSide:
        """The model's normed states in place of mean rows, and its negative entropies."""
        assert usage is None, "an objective with a cap takes no sample of the vocabulary"
        normed = self._norm(final)
        offset = normed.new_empty(len(normed))

        def measure(tokens: slice) -> None:
            log_probs = self._log_probs(normed[tokens])[0]
            offset[tokens] = (log_probs.exp() * log_probs).sum(-1)

        self._in_chunks(len(final), self._all_keys, measure)
        return ModelSide(normed, offset)

    @torch.no_grad()
    def kl(self, translated: States, model: ModelSide) -> PerToken:
        kl = torch.empty_like(model.offset)

        def measure(tokens: slice) -> None:
            probs = self._log_probs(model.mean_row[tokens])[0].exp_()
            log_probs = self._log_probs(self._norm(translated[tokens]))[0]
            kl[tokens] = model.offset[tokens] - torch.linalg.vecdot(probs, log_probs)

        self._in_chunks(len(kl), self._all_keys, measure)
        return kl

    @torch.no_grad()
    def gradient(
        self,
        translated: States,
        model: ModelSide,
        keys: Keys | None = None,  # noqa: ARG002 - always those of the whole vocabulary
    ) -> tuple[PerToken, States]:
        kl, gradient = torch.empty_like(model.offset), torch.empty_like(translated)
        rows = self._all_keys[:, : self._d_model]

        def measure(tokens: slice) -> None:
            with torch.enable_grad():
                x = translated[tokens].detach().requires_grad_()
                normed = self._norm(x)
            probs = self._log_probs(model.mean_row[tokens])[0].exp_()
            log_probs, slope = self._log_probs(normed.detach())
            kl[tokens] = model.offset[tokens] - torch.linalg.vecdot(probs, log_probs)
            grad_logits = log_probs.exp_().sub_(probs).mul_(slope)
            (gradient[tokens],) = torch.autograd.grad(normed, x, grad_logits @ rows)

        self._in_chunks(len(kl), self._all_keys, measure)
        return kl, gradient

    def _log_probs(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities, and the slope of the cap at every logit."""
        query = self._query(normed, self._all_keys)
        bounded = torch.tanh((query @ self._all_keys.T).div_(self._cap))
        return (self._cap * bounded).log_softmax(-1), 1 - bounded.square()


def make_objective(
    unembedding: Unembedding, *, dtype: torch.dtype = torch.float32, kernel: Kernel = "products"
) -> LensKL:
    """The objective for an unembedding. With a cap, it is exact and in float32.

    Args:
        dtype: the dtype of the products if there is no cap.
        kernel: the kernel of the products if there is no cap; see `LensKL`.
    """
    if unembedding.cap is not None:
        return CappedLensKL(unembedding)
    return LensKL(unembedding, dtype=dtype, kernel=kernel)
