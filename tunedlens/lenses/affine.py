"""Lenses with an affine translator for every layer: tuned lens and Jacobian lens."""

from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.lenses.base import ResidualLens
from tunedlens.model import FrozenModel, ModelIdentity, Unembedding


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


class SiteTranslator(NamedTuple):
    """A translator and the state that it reads."""

    site: str
    layer: int
    translator: Translator


class AffineLens(ResidualLens):
    """One affine translator per site and layer, then the model's final norm and unembedding.

    Its parameters are those of the translators and nothing else: `translators.state_dict()`
    has the keys `<site>.<layer>.weight` and `<site>.<layer>.bias`, as has the file of a lens.
    """

    sites: ClassVar[tuple[str, ...]] = ("resid_pre",)
    """The sites that have translators."""
    save: ClassVar[Callable[..., None]]
    """See `tunedlens.checkpoint.save_lens`."""
    load: ClassVar[Callable[..., "AffineLens"]]
    """See `tunedlens.checkpoint.load_lens_of_kind`."""
    push_to_hub: ClassVar[Callable[..., str]]
    """See `tunedlens.sharing.push_to_hub`."""

    def __init__(self, unembedding: Unembedding, identity: ModelIdentity) -> None:
        super().__init__(unembedding, identity)
        self.translators = nn.ModuleDict({
            site: nn.ModuleList(Translator(identity.d_model) for _ in range(identity.n_layers))
            for site in self.sites
        }).to(unembedding.weight.device)  # fmt: skip

    def translator(self, layer: int, site: str = "resid_pre") -> Translator:
        """The translator of one state; `layer` is counted from 0."""
        return self.translators.get_submodule(f"{site}.{layer}")  # type: ignore[return-value]

    def all_translators(self) -> Iterator[SiteTranslator]:
        """Every translator, by site and then by layer."""
        for site in self.sites:
            for layer in range(self.n_layers):
                yield SiteTranslator(site, layer, self.translator(layer, site))

    def transform_hidden(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions d_model"]:
        layer = self.resolve(layer)
        hidden = self._checked(hidden)
        return hidden if layer == self.n_layers else self.translator(layer)(hidden)


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
            for one, jacobian in zip(lens.all_translators(), jacobians, strict=True):
                one.translator.weight.copy_(jacobian - identity)
        return lens
