"""A probe: a model's predictions on a short text. It is saved with a lens and checked on loading.

The fingerprint of a model covers its final norm and unembedding. A probe covers the blocks: it
detects fine-tuning, or a release of transformers that computes them differently.
"""

from collections.abc import Mapping
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.devices import float32_products
from tunedlens.errors import InputError
from tunedlens.files import JsonObject, as_type
from tunedlens.model.frozen import FrozenModel

_TEXT = "The capital of France is Paris. 1, 2, 3, 4, 5, 6, 7. def main():\n    return"
_TOKENS, _POSITIONS, _TOP_K = 24, 8, 8


class _Probe(TypedDict):
    """See `take_probe`."""

    ids: list[int]
    top_ids: list[list[int]]
    top_log_probs: list[list[float]]


def probe_ids(model: FrozenModel) -> Int[Tensor, "1 seq"]:
    """The tokens of the short text, on the model's device."""
    return model.encode(_TEXT, is_any_length=True)[:, : min(_TOKENS, model.context or _TOKENS)]


@torch.no_grad()
def take_probe(model: FrozenModel) -> JsonObject:
    """The model's most likely next tokens at the last few positions of a short text.

    Returns:
        The ids of the text, and by position the ids of the most likely tokens and their
        log-probabilities in nats. It can be written as JSON.
    """
    ids = probe_ids(model)[0]
    log_probs = _log_probs(model, ids.tolist())[-_POSITIONS:]
    top = log_probs.topk(min(_TOP_K, log_probs.shape[-1]))
    values = [[round(value, 6) for value in row] for row in top.values.tolist()]
    return {
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "ids": ids.tolist(),
        "top_ids": top.indices.tolist(),
        "top_log_probs": values,
    }


def probe_tolerance(probe: Mapping[str, object], model: FrozenModel) -> float:
    """The largest KL in nats that rounding explains; it is larger with half precision."""
    dtypes = {probe.get("dtype"), str(model.model.dtype).removeprefix("torch.")}
    return 1e-4 if dtypes == {"float32"} else 0.02


@torch.no_grad()
def probe_kl(probe: Mapping[str, object], model: FrozenModel) -> float:
    """Mean KL from the probed model to another one, in nats.

    All tokens that are not in the probe count as one token, so this is at most the KL over the
    vocabulary.

    Raises:
        InputError: the probe is damaged, or its tokens are not the model's.
    """
    vocab_size = model.identity.vocab_size
    try:
        known = as_type(_Probe, probe, "it")
        ids, top_ids = known["ids"], torch.tensor(known["top_ids"])
        expected = torch.tensor(known["top_log_probs"], dtype=torch.float64)
        is_grid = top_ids.ndim == 2 and top_ids.numel() > 0
        if not ids or not is_grid or top_ids.shape != expected.shape or len(top_ids) > len(ids):
            raise ValueError("its lists differ in length")
        if not 0 <= min(*ids, int(top_ids.min())) <= max(*ids, int(top_ids.max())) < vocab_size:
            raise ValueError(f"expected token ids from 0 to {vocab_size - 1}")
    except ValueError as error:
        raise InputError(f"the probe saved with the lens is damaged: {error}") from error
    log_probs = _log_probs(model, ids)[-len(top_ids) :].double().cpu()
    actual = _with_rest(log_probs.gather(-1, top_ids))
    expected = _with_rest(expected)
    return float((expected.exp() * (expected - actual)).sum(-1).mean())


@float32_products()
def _log_probs(model: FrozenModel, ids: list[int]) -> Float[Tensor, "positions vocab"]:
    final = model.residual_stream(torch.tensor([ids], device=model.device))[-1][0]
    return model.unembedding(final).log_softmax(-1)


def _with_rest(log_probs: Float[Tensor, "positions k"]) -> Float[Tensor, "positions k+1"]:
    """Append the log-probability of all other tokens."""
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([log_probs, rest], -1)
