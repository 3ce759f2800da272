"""The logit lens, which has no translators."""

from jaxtyping import Float
from torch import Tensor

from tunedlens.lenses.base import ResidualLens


class LogitLens(ResidualLens):
    """Decodes every state with the model's own final norm and unembedding.

    Source:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
    """

    def transform_hidden(
        self,
        hidden: Float[Tensor, "*positions d_model"],
        layer: int,
        site: str = "resid_pre",  # noqa: ARG002 - it reads all sites alike
    ) -> Float[Tensor, "*positions d_model"]:
        self.resolve(layer)
        return self._checked(hidden)
