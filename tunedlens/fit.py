"""How translators take a step: Muon for the matrices, AdamW for the biases."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.config import TrainConfig
from tunedlens.lens import Translator, TunedLens


class MuonFit:
    """Optimisers of a tuned lens, with a learning rate that falls linearly to 0.

    The numbers depend on the step's index and the total alone, so that a run which goes
    on from a saved state takes the steps that it would have taken.

    Args:
        lens: whose translators are trained.
        config: learning rate, momentum and weight decay.
        total_steps: steps until the learning rate reaches 0.

    Source:
        Jordan et al. 2024, "Muon", kellerjordan.github.io/posts/muon; the step is scaled
        to the size of AdamW's as in Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(self, lens: TunedLens, config: TrainConfig, total_steps: int) -> None:
        translators = [cast(Translator, translator) for translator in lens.translators]
        self._learning_rate = config.lr
        self._total_steps = total_steps
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                [translator.weight for translator in translators],
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [translator.bias for translator in translators],
                lr=config.lr,
                weight_decay=config.weight_decay,
            ),
        ]

    def step(self, index: int) -> None:
        """Take step number `index` with the gradients that are there, and clear them."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate * (1 - index / self._total_steps)
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Float[Tensor, "..."]]:
        """What the next step depends on besides the translators."""
        return {
            f"{type(optimizer).__name__}.{parameter}.{name}": value
            for optimizer in self._optimizers
            for parameter, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }

    def load_state(self, state: dict[str, Float[Tensor, "..."]]) -> None:
        """Go on from what `state` gave."""
        for optimizer in self._optimizers:
            values: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                kind, parameter, name = key.split(".")
                if kind == type(optimizer).__name__:
                    values.setdefault(int(parameter), {})[name] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": values, "param_groups": groups})
