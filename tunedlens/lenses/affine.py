"""Lenses with affine translators, by site and layer: tuned lens and Jacobian lens."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.errors import InputError
from tunedlens.lenses.base import ResidualLens
from tunedlens.model import (
    TRANSLATED_SITES,
    FrozenModel,
    HookPoint,
    ModelIdentity,
    Unembedding,
    hook_points,
)


class Translator(nn.Module):
    """`h + A h + b`. A new one is the identity, so a new tuned lens equals the logit lens."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"]
    ) -> Float[Tensor, "*positions d_model"]:
        return hidden + F.linear(hidden, self.weight, self.bias)


class LowRankTranslator(nn.Module):
    """`h + L R h + b`, with a product of two thin matrices in place of A."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(d_model, rank))
        self.right = nn.Parameter(torch.zeros(rank, d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    @property
    def weight(self) -> Float[Tensor, "d_model d_model"]:
        """A = L R."""
        return self.left @ self.right

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"]
    ) -> Float[Tensor, "*positions d_model"]:
        return hidden + F.linear(F.linear(hidden, self.right), self.left, self.bias)


class AffineLens(ResidualLens):
    """An affine translator per site and layer, then the model's final norm and unembedding.

    Its only parameters are those of the translators. `translators.state_dict()` and the file of
    a lens have the keys `<site>.<layer>.weight` and `<site>.<layer>.bias`. A lens of low rank has
    `left` and `right` instead of `weight`, which is their product. Only lenses of this class can
    be saved.

    Args:
        sites: the sites that have translators, from `model.TRANSLATED_SITES`.
        layers: the layers that have translators, counted from 0; all by default.
        rank: the largest rank of a translator's A; not limited by default.

    Raises:
        InputError: there is no such site or layer, or the rank is not between 1 and d_model.
    """

    save: ClassVar[Callable[..., None]]
    """See `tunedlens.checkpoint.save_lens`."""
    load: ClassVar[Callable[..., "AffineLens"]]
    """See `tunedlens.checkpoint.load_lens_of_kind`."""
    push_to_hub: ClassVar[Callable[..., str]]
    """See `tunedlens.sharing.push_to_hub`."""
    as_transformer_lens: ClassVar[Callable[..., Callable[[Tensor, int], Tensor]]]
    """See `tunedlens.neighbours.as_transformer_lens`."""

    def __init__(
        self,
        unembedding: Unembedding,
        identity: ModelIdentity,
        sites: Sequence[str] = ("resid_pre",),
        layers: Sequence[int] | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(unembedding, identity)
        layers = range(self.n_layers) if layers is None else layers
        if not layers or not set(layers) <= set(range(self.n_layers)):
            raise InputError(
                f"translated layers must be between 0 and {self.n_layers - 1} for "
                f"{identity.name}, got {', '.join(map(str, layers)) or 'none'}"
            )
        if rank is not None and not 1 <= rank <= identity.d_model:
            raise InputError(
                f"the rank of a translator must be between 1 and {identity.d_model}, the width of "
                f"{identity.name}; got {rank}"
            )
        for site in sites:
            if site not in TRANSLATED_SITES:
                raise InputError(
                    f"a lens can have translators at {', '.join(TRANSLATED_SITES)}; got {site!r} "
                    "(the stream that leaves a block is resid_pre of the next layer)"
                )
        self.sites = tuple(site for site in TRANSLATED_SITES if site in sites)
        """The sites that have translators, in the order in which a block computes them."""
        self.layers = tuple(sorted(set(layers)))
        """The layers that have translators, at every one of these sites."""
        self.rank = rank
        """The largest rank of a translator's A; None if it is not limited."""
        self.translators = nn.ModuleDict({
            site: nn.ModuleDict({str(layer): self._new_translator() for layer in self.layers})
            for site in self.sites
        }).to(unembedding.weight.device)  # fmt: skip

    def _new_translator(self) -> Translator | LowRankTranslator:
        if self.rank is None:
            return Translator(self.identity.d_model)
        return LowRankTranslator(self.identity.d_model, self.rank)

    @classmethod
    def from_model(
        cls,
        model: FrozenModel,
        sites: Sequence[str] = ("resid_pre",),
        layers: Sequence[int] | None = None,
        rank: int | None = None,
    ) -> Self:
        """Create the untrained lens of a model."""
        return cls(model.unembedding, model.identity, sites, layers, rank)

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """The sites and layers of the translators, by site and then by layer."""
        return hook_points(self.sites, self.layers)

    def translator(self, layer: int, site: str = "resid_pre") -> Translator | LowRankTranslator:
        """The translator of one state; `layer` is counted from 0."""
        return self.translators.get_submodule(f"{site}.{layer}")  # type: ignore[return-value]

    def all_translators(self) -> list[Translator | LowRankTranslator]:
        """Every translator, in the order of `points`."""
        return [self.translator(point.layer, point.site) for point in self.points]

    def reads(self, site: str, layer: int) -> bool:
        if site == "resid_post":
            site, layer = "resid_pre", layer + 1
        is_last = site == "resid_pre" and layer == self.n_layers
        return is_last or (site in self.sites and layer in self.layers)

    def transform_hidden(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int, site: str = "resid_pre"
    ) -> Float[Tensor, "*positions d_model"]:
        if site == "resid_post":
            layer, site = self.resolve(layer) + 1, "resid_pre"
        layer = self.resolve(layer)
        hidden = self._checked(hidden)
        if site == "resid_pre" and layer == self.n_layers:
            return hidden
        if site not in self.sites:
            raise InputError(
                f"the lens has translators at {', '.join(self.sites)}, not at {site}; train it "
                f"with --sites {site}"
            )
        if layer not in self.layers:
            raise InputError(
                f"the lens has translators at layers {', '.join(map(str, self.layers))}, not at "
                f"layer {layer}; train it with --layers {layer}"
            )
        return self.translator(layer, site)(hidden)


class TunedLens(AffineLens):
    """Translators that are trained so that each layer predicts the model's final output.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 3.
    """


class JacobianLens(AffineLens):
    """Translators J h, where J is the mean Jacobian of the final state by the layer's state.

    Source:
        Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in
        Language Models", transformer-circuits.pub/2026/workspace.
    """

    @classmethod
    def from_jacobians(
        cls,
        model: FrozenModel,
        jacobians: Float[Tensor, "layers d_model d_model"],
        layers: Sequence[int] | None = None,
    ) -> Self:
        """Create a lens from Jacobians, d final / d state, in ascending order of their layers."""
        lens = cls.from_model(model, layers=layers)
        identity = torch.eye(jacobians.shape[-1], device=jacobians.device)
        with torch.no_grad():
            for translator, jacobian in zip(lens.all_translators(), jacobians, strict=True):
                translator.weight.copy_(jacobian - identity)
        return lens
