"""Lenses: a hidden state of any layer, translated and decoded into logits."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.errors import InputError
from tunedlens.model import FrozenModel, ModelIdentity, Unembedding, require_same_model


class Lens(nn.Module, ABC):
    """What a model of `n_layers` blocks believes at each of its `n_layers + 1` states.

    State `layer` is the residual stream entering block `layer`; the last one, also -1, is
    what the final norm sees. A lens works in float32, whatever the model's dtype, until it
    is itself moved to another.
    """

    def __init__(self, identity: ModelIdentity) -> None:
        super().__init__()
        self.identity = identity

    @property
    def n_layers(self) -> int:
        """Number of blocks, and of states that a lens can translate."""
        return self.identity.n_layers

    def resolve(self, layer: int) -> int:
        """The layer counted from 0; negative ones count from the end.

        Raises:
            InputError: there is no such layer.
        """
        if not -self.n_layers - 1 <= layer <= self.n_layers:
            raise InputError(
                f"layer must be between 0 and {self.n_layers} (or {-self.n_layers - 1} and -1, "
                f"from the end) for {self.identity.name}, got {layer}"
            )
        return layer % (self.n_layers + 1)

    @abstractmethod
    def forward(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions vocab"]:
        """Raw logits of the state of `layer`.

        Raises:
            InputError: there is no such layer, or the width is another model's.
        """


class ResidualLens(Lens):
    """Carries a state over to what the final norm reads, and lets the model decode that.

    At the last state every such lens is the model.
    """

    generate: ClassVar[Callable[..., str | list[str]]]
    """See `tunedlens.generation.generate`."""

    def __init__(self, unembedding: Unembedding, identity: ModelIdentity) -> None:
        super().__init__(identity)
        self.unembedding = unembedding.shared()

    @classmethod
    def from_model(cls, model: FrozenModel) -> Self:
        """The lens of this model as it is before any training."""
        return cls(model.unembedding, model.identity)

    @abstractmethod
    def transform_hidden(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions d_model"]:
        """The state of `layer` as the final norm is to read it, in the lens's dtype.

        Raises:
            InputError: there is no such layer, or the width is another model's.
        """

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions vocab"]:
        return self.unembedding(self.transform_hidden(hidden, layer))

    def _checked(self, hidden: Tensor) -> Tensor:
        """The hidden states in the lens's dtype.

        Raises:
            InputError: the width is another model's.
        """
        if hidden.shape[-1] != self.identity.d_model:
            raise InputError(
                f"hidden states of {self.identity.name} have {self.identity.d_model} "
                f"dimensions, got {tuple(hidden.shape)}"
            )
        return hidden.to(self.unembedding.weight.dtype)


class LogitLens(ResidualLens):
    """Decodes every state with the model's own final norm and unembedding.

    Source:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
    """

    def transform_hidden(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions d_model"]:
        self.resolve(layer)
        return self._checked(hidden)


class Translator(nn.Module):
    """`h + A h + b`: the identity when new, so a new tuned lens is the logit lens."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"]
    ) -> Float[Tensor, "*positions d_model"]:
        return hidden + F.linear(hidden, self.weight, self.bias)


class AffineLens(ResidualLens):
    """One affine translator per layer, then the model's final norm and unembedding.

    Its parameters are those of the translators and nothing else.
    """

    save: ClassVar[Callable[..., None]]
    """See `tunedlens.checkpoint.save_lens`."""
    load: ClassVar[Callable[..., "AffineLens"]]
    """See `tunedlens.checkpoint.load_lens_of_kind`."""

    def __init__(self, unembedding: Unembedding, identity: ModelIdentity) -> None:
        super().__init__(unembedding, identity)
        self.translators = nn.ModuleList(
            Translator(identity.d_model).to(unembedding.weight.device)
            for _ in range(identity.n_layers)
        )

    def transform_hidden(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions d_model"]:
        layer = self.resolve(layer)
        hidden = self._checked(hidden)
        return hidden if layer == self.n_layers else self.translators[layer](hidden)


class TunedLens(AffineLens):
    """Translators fitted to what the model says in the end.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 3.
    """


class JacobianLens(AffineLens):
    """Translators that are the mean Jacobian of the final state in the layer's: J h.

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
            weights = [p for p in lens.parameters() if p.ndim == 2]
            for weight, jacobian in zip(weights, jacobians, strict=True):
                weight.copy_(jacobian - identity)
        return lens


class ConstantLens(Lens):
    """The same distribution whatever the state: what a KL is to be measured against.

    Args:
        log_probs: of every token, in nats.
        identity: the model's.
    """

    log_probs: Float[Tensor, " vocab"]

    def __init__(self, log_probs: Float[Tensor, " vocab"], identity: ModelIdentity) -> None:
        super().__init__(identity)
        self.register_buffer("log_probs", log_probs.float(), persistent=False)

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions vocab"]:
        self.resolve(layer)
        return self.log_probs.expand(*hidden.shape[:-1], -1)


def require_made_for(model: FrozenModel, lenses: Mapping[str, Lens]) -> None:
    """Make sure that every lens, by its name, fits the model.

    Raises:
        InputError: one was made for another; says what differs.
    """
    identity = dataclasses.asdict(model.identity)
    for name, lens in lenses.items():
        require_same_model(dataclasses.asdict(lens.identity), identity, f"the lens {name}")
