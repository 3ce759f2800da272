"""A lens that ignores its input."""

from jaxtyping import Float
from torch import Tensor

from tunedlens.lenses.base import Lens
from tunedlens.model import ModelIdentity


class ConstantLens(Lens):
    """Predicts the same distribution at every state; a baseline for other lenses.

    Args:
        log_probs: the log-probability of every token, in nats.
    """

    log_probs: Float[Tensor, " vocab"]

    def __init__(self, log_probs: Float[Tensor, " vocab"], identity: ModelIdentity) -> None:
        super().__init__(identity)
        self.register_buffer("log_probs", log_probs.float(), persistent=False)

    def forward(
        self,
        hidden: Float[Tensor, "*positions d_model"],
        layer: int,
        site: str = "resid_pre",  # noqa: ARG002 - it ignores all states
    ) -> Float[Tensor, "*positions vocab"]:
        self.resolve(layer)
        return self.log_probs.expand(*hidden.shape[:-1], -1)
