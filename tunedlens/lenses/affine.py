"""Lenses with an affine translator for every layer: tuned lens and Jacobian lens."""

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


class AffineLens(ResidualLens):
    """One affine translator per site and layer, then the model's final norm and unembedding.

    Its parameters are those of the translators and nothing else: `translators.state_dict()`
    has the keys `<site>.<layer>.weight` and `<site>.<layer>.bias`, as has the file of a lens.
    Only lenses of this class can be saved.

    Args:
        sites: the sites that have translators at every layer, from `model.TRANSLATED_SITES`.

    Raises:
        InputError: there is no such site.
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
    ) -> None:
        super().__init__(unembedding, identity)
        for site in sites:
            if site not in TRANSLATED_SITES:
                raise InputError(
                    f"a lens can have translators at {', '.join(TRANSLATED_SITES)}; got {site!r} "
                    "(the stream leaving a block is resid_pre of the next layer)"
                )
        self.sites = tuple(site for site in TRANSLATED_SITES if site in sites)
        """The sites that have translators, in the order in which a block computes them."""
        self.translators = nn.ModuleDict({
            site: nn.ModuleList(Translator(identity.d_model) for _ in range(identity.n_layers))
            for site in self.sites
        }).to(unembedding.weight.device)  # fmt: skip

    @classmethod
    def from_model(cls, model: FrozenModel, sites: Sequence[str] = ("resid_pre",)) -> Self:
        """Create the untrained lens of a model."""
        return cls(model.unembedding, model.identity, sites)

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """Where the translators are, by site and then by layer."""
        return hook_points(self.sites, self.n_layers)

    def translator(self, layer: int, site: str = "resid_pre") -> Translator:
        """The translator of one state; `layer` is counted from 0."""
        return self.translators.get_submodule(f"{site}.{layer}")  # type: ignore[return-value]

    def all_translators(self) -> list[Translator]:
        """Every translator, in the order of `points`."""
        return [self.translator(point.layer, point.site) for point in self.points]

    def reads(self, site: str) -> bool:
        return site in self.sites or (site == "resid_post" and "resid_pre" in self.sites)

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
        return self.translator(layer, site)(hidden)


class TunedLens(AffineLens):
    """Translators trained so that each layer predicts what the model predicts in the end.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 3.
    """


class JacobianLens(AffineLens):
    """Translators that are the mean Jacobian J of the final state in the layer's state: J h.

    Source:
        Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in
        Language Models", transformer-circuits.pub/2026/workspace.
    """

    @classmethod
    def from_jacobians(
        cls, model: FrozenModel, jacobians: Float[Tensor, "layers d_model d_model"]
    ) -> Self:
        """The lens with these Jacobians, d final / d state of every layer."""
        lens = cls.from_model(model)
        identity = torch.eye(jacobians.shape[-1], device=jacobians.device)
        with torch.no_grad():
            for translator, jacobian in zip(lens.all_translators(), jacobians, strict=True):
                translator.weight.copy_(jacobian - identity)
        return lens
