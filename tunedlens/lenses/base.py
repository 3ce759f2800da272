"""The base classes of all lenses."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.errors import InputError
from tunedlens.model import FrozenModel, ModelIdentity, Unembedding, require_same_model


class Lens(nn.Module, ABC):
    """Maps each of the `n_layers + 1` states of the residual stream to logits.

    State `layer` is the residual stream entering block `layer`. The last one (also -1) is the
    input of the final norm. A lens computes in float32 for any dtype of the model, unless the
    lens itself is converted to another dtype.
    """

    def __init__(self, identity: ModelIdentity) -> None:
        super().__init__()
        self.identity = identity

    _repr_html_: ClassVar[Callable[..., str]]
    """See `tunedlens.report.notebook`."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.identity.name}, {self.n_layers} layers of width "
            f"{self.identity.d_model})"
        )

    @property
    def kind_name(self) -> str:
        """The name of a lens that has no other name: `logit`, `tuned`, `jacobian`."""
        return type(self).__name__.removesuffix("Lens").lower()

    @property
    def n_layers(self) -> int:
        """The number of blocks, which is also the number of states that a lens translates."""
        return self.identity.n_layers

    def resolve(self, layer: int) -> int:
        """The layer as an index from 0. A negative layer counts from the end.

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
        self, hidden: Float[Tensor, "*positions d_model"], layer: int, site: str = "resid_pre"
    ) -> Float[Tensor, "*positions vocab"]:
        """Decode a state to raw logits.

        Args:
            hidden: the state.
            layer: the layer of the state.
            site: one of `model.SITES`; by default the stream entering the block.

        Raises:
            InputError: there is no such layer or site, or the width is not the model's.
        """


class ResidualLens(Lens):
    """Predicts the final state, then decodes it with the model's final norm and unembedding.

    At the last state, every such lens gives the model's own logits.
    """

    generate: ClassVar[Callable]
    """See `tunedlens.generation.generate`."""
    invert: ClassVar[Callable[..., tuple[Tensor, Tensor, Tensor]]]
    """See `tunedlens.causal.invert`."""

    def __init__(self, unembedding: Unembedding, identity: ModelIdentity) -> None:
        super().__init__(identity)
        self.unembedding = unembedding.shared()

    @classmethod
    def from_model(cls, model: FrozenModel) -> Self:
        """Create the untrained lens of a model."""
        return cls(model.unembedding, model.identity)

    @abstractmethod
    def transform_hidden(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int, site: str = "resid_pre"
    ) -> Float[Tensor, "*positions d_model"]:
        """The lens's prediction of the final state, before the final norm, in the lens's dtype.

        Raises:
            InputError: there is no such layer, or the width is not the model's.
        """

    def reads(self, site: str, layer: int) -> bool:  # noqa: ARG002 - without translators, all
        """Whether the lens reads a state; layers count from 0. Every lens reads the last state."""
        return True

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int, site: str = "resid_pre"
    ) -> Float[Tensor, "*positions vocab"]:
        return self.unembedding(self.transform_hidden(hidden, layer, site))

    def _checked(self, hidden: Tensor) -> Tensor:
        """Convert the hidden states to the lens's dtype.

        Raises:
            InputError: the width is not the model's.
        """
        if hidden.shape[-1] != self.identity.d_model:
            raise InputError(
                f"hidden states of {self.identity.name} have {self.identity.d_model} "
                f"dimensions, got {tuple(hidden.shape)}"
            )
        return hidden.to(self.unembedding.weight.dtype)


def require_made_for(model: FrozenModel, lenses: Mapping[str, Lens]) -> None:
    """Check that every lens, given by its name, was made for the model.

    Raises:
        InputError: a lens was made for another model; the message says what differs.
    """
    identity = dataclasses.asdict(model.identity)
    for name, lens in lenses.items():
        require_same_model(dataclasses.asdict(lens.identity), identity, f"the lens {name}")
