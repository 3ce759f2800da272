"""Converts lenses for use in other libraries."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.lenses import AffineLens
from tunedlens.model import HookPoint

_CENTRED = 3e-7
"""|mean| / standard deviation of a state below which its mean counts as zero: float32 rounding."""


def as_transformer_lens(
    lens: AffineLens, *, incl_mid: bool = False
) -> Callable[[Tensor, int], Tensor]:
    """The translators as a function for `logit_lens(model, ..., lens=...)` of TransformerLens 4.

    TransformerLens calls the function with an entry of its accumulated stack and the index of
    the entry, then applies the model's own final norm and unembedding. Without `incl_mid`, entry i
    is the stream entering block i. With it, entry 2i is the stream entering block i, and entry
    2i + 1 is the stream between attention and MLP of block i. The last entry is the final state,
    which is not changed.

    The function raises InputError if the lens has no translator for an entry, if there is no such
    entry, or if two or more states in a row have a mean of zero. A mean of zero shows that
    TransformerLens has centred the weights that write to the stream; the lens was trained on a
    model without this change.

    Args:
        incl_mid: must have the same value as in the call of `logit_lens`.
    """
    centred_states = 0

    def translate(
        entry: Float[Tensor, "*positions d_model"], index: int
    ) -> Float[Tensor, "*positions d_model"]:
        nonlocal centred_states
        point = _stack_point(index, lens.n_layers, incl_mid)
        if not lens.reads(point.site, point.layer):
            raise InputError(
                f"the lens has no translator for entry {index}, {point.site} of block "
                f"{point.layer}, only for {', '.join(lens.sites)} of blocks "
                f"{', '.join(map(str, lens.layers))}; train it there too, or leave the entry out "
                "with layers=[...]"
            )
        centred_states = centred_states + entry[..., 0].numel() if _is_centred(entry) else 0
        if centred_states > 1:
            raise InputError(
                "the states have a mean of zero: TransformerLens has centred the weights that "
                "write to the stream, and the lens was trained without that; use the model as "
                "boot_transformers returns it, or enable_compatibility_mode(no_processing=True)"
            )
        return lens.transform_hidden(entry, point.layer, point.site).to(entry.dtype)

    return translate


def _stack_point(index: int, n_layers: int, incl_mid: bool) -> HookPoint:
    """The site and layer of an entry of TransformerLens's accumulated stack.

    Raises:
        InputError: there is no such entry.
    """
    last = 2 * n_layers if incl_mid else n_layers
    if not 0 <= index <= last:
        raise InputError(
            f"expected an entry between 0 and {last}, got {index}; use the same incl_mid= in "
            "as_transformer_lens and logit_lens, and a lens of this model"
        )
    layer, is_mid = divmod(index, 2) if incl_mid else (index, False)
    return HookPoint("resid_mid" if is_mid else "resid_pre", layer)


def _is_centred(states: Float[Tensor, "*positions d_model"]) -> bool:
    """Whether every state has a mean of zero, to rounding."""
    states = states.detach().float()
    return bool((states.mean(-1).abs() < _CENTRED * states.std(-1)).all())
