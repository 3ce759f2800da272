"""Optimizers of the KL: our own, and the published ones that it is compared with."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.fit.least_squares import LeastSquares
from tunedlens.lenses import Translator, TunedLens

_DAMPING = 1e-4
"""Of the whitening, relative to the mean square of the inputs."""
_AVERAGING = 2
"""In the average, a step weighs about as much as this power of its number."""


class LensOptimizer(ABC):
    """State in, state out: what turns gradients into a lens.

    A step depends on the gradients and on `state` alone, so that a run which goes on from a
    saved state takes the steps that it would have taken.
    """

    lens: TunedLens
    """Whose translators the next gradients are taken at."""

    @abstractmethod
    def step(self, active: Sequence[bool], share_done: float) -> None:
        """Take a step with the gradients that are there, and clear them.

        Args:
            active: for every layer, whether it still learns.
            share_done: how much of a fixed budget is behind, from 0 to 1.
        """

    @abstractmethod
    def result(self) -> TunedLens:
        """The lens as it would be if this were the last step."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What the next step and the result depend on."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""


def evening(
    second_moment: Float[Tensor, "layers width width"],
) -> Float[Tensor, "layers width width"]:
    """Inverse fourth root of the inputs' second moment: what evens them out, half way.

    Damped, and scaled so that what comes out has mean square 1.
    """
    values, vectors = torch.linalg.eigh(second_moment)
    values = values.clamp(min=0) + _DAMPING * values.mean(-1, keepdim=True)
    inverse_roots = values.pow(-0.25) / values.sqrt().mean(-1, keepdim=True).sqrt()
    return (vectors * inverse_roots[:, None]) @ vectors.mT


class Preconditioned(LensOptimizer):
    """Muon in evened-out inputs, in steps of one size, and the average of where they lead.

    A few directions of the residual stream carry most of its variance, so a step that is
    even in the translator's own coordinates is far from even in what it changes. So the
    steps are taken in `M` of `[A b] = start + M P` (the bias is the column of an input that
    is always 1), with `P` the inverse fourth root of the inputs' second moment: half way to
    whitening, since directions that hardly any token uses also have less to teach.

    The size of a step is a share of the error that least squares leave in the final state,
    layer by layer, and it never changes: noise is taken away by averaging over the last
    part of the way, which grows with it. So the result is a good one whenever it is asked
    for, and no number of steps has to be known beforehand.

    Args:
        lens: where the steps start if `start` is not called.
        step_size: change of a translated state in one step, relative to the root mean
            square error of least squares.
        momentum: of the gradients.
        weight_decay: pulls back to the start.

    Source:
        Jordan et al. 2024, "Muon", kellerjordan.github.io/posts/muon; Shamir and Zhang
        2013, arXiv:1212.1824, section 4, for the average.
    """

    def __init__(
        self, lens: TunedLens, step_size: float, momentum: float, weight_decay: float
    ) -> None:
        self.lens = lens
        self._average = TunedLens(lens.unembedding, lens.identity)
        self._step_size, self._momentum, self._weight_decay = step_size, momentum, weight_decay
        start = _columns(lens)
        width = start.shape[-1]
        self._state = {
            "start": start,
            "evening": torch.eye(width, device=start.device).repeat(lens.n_layers, 1, 1),
            "error": start.new_ones(lens.n_layers),
            "moved": torch.zeros_like(start),
            "averaged": torch.zeros_like(start),
            "gradient": torch.zeros_like(start),
            "steps": start.new_zeros(lens.n_layers),
        }

    def start(self, first_pass: LeastSquares, solution: Tensor, *, from_there: bool = True) -> None:
        """Take from a first pass over the text what evens the inputs out, and where to start.

        Args:
            first_pass: its sums.
            solution: `[A b]` of every layer, as the sums give it.
            from_there: start from the solution; else from the lens as it is.
        """
        self._state["evening"].copy_(evening(first_pass.second_moment))
        self._state["error"].copy_(first_pass.mean_square_error(solution).clamp(min=0).sqrt())
        if from_there:
            self._state["start"].copy_(solution)
        self._write(self.lens, "moved")

    def revert(self, layer: int) -> None:
        """Make the result of one layer what the steps started from."""
        self._state["averaged"][layer].zero_()

    def step(self, active: Sequence[bool], share_done: float) -> None:  # noqa: ARG002 - see class
        state, layers = self._state, [layer for layer, learns in enumerate(active) if learns]
        evened = _gradients(self.lens)[layers] @ state["evening"][layers]
        self.lens.zero_grad()
        gradient = state["gradient"][layers].lerp(evened, 1 - self._momentum)
        direction = _orthogonalised(evened.lerp(gradient, self._momentum))  # Nesterov's
        size = self._step_size * state["error"][layers, None, None]
        moved = state["moved"][layers] * (1 - size * self._weight_decay) - size * direction
        state["gradient"][layers], state["moved"][layers] = gradient, moved
        state["steps"][layers] += 1
        weight = (_AVERAGING + 1) / (state["steps"][layers, None, None] + _AVERAGING)
        state["averaged"][layers] = state["averaged"][layers].lerp(moved, weight)
        self._write(self.lens, "moved")

    def result(self) -> TunedLens:
        self._write(self._average, "averaged")
        return self._average

    def state(self) -> dict[str, Tensor]:
        return self._state

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, value in self._state.items():
            value.copy_(state[name])
        self._write(self.lens, "moved")

    def _write(self, lens: TunedLens, name: str) -> None:
        columns = torch.baddbmm(self._state["start"], self._state[name], self._state["evening"])
        for translator, value in zip(_translators(lens), columns, strict=True):
            translator.weight.data.copy_(value[:, :-1])
            translator.bias.data.copy_(value[:, -1])


def _orthogonalised(
    matrices: Float[Tensor, "layers rows columns"],
) -> Float[Tensor, "layers rows columns"]:
    """Each with its singular values brought near 1 (between about 0.7 and 1.2).

    Five Newton-Schulz iterations, in bfloat16, with the coefficients of the source.

    Source:
        Jordan et al. 2024, "Muon", kellerjordan.github.io/posts/muon.
    """
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.to(matrices.dtype)


class Hyperparameters(NamedTuple):
    """What a fit does if it is not told otherwise."""

    learning_rate: float
    momentum: float
    weight_decay: float


DEFAULT_HYPERPARAMETERS = {
    "preconditioned": Hyperparameters(0.035, 0.8, 0.0),
    "sgd": Hyperparameters(0.1, 0.9, 1e-3),
    "adamw": Hyperparameters(1e-3, 0.9, 1e-3),
    "muon": Hyperparameters(0.04, 0.95, 0.0),
}
"""Ours; SGD and Adam as tuned-lens 0.2.0 has them, though on the embedded model SGD is better
at ten times its rate; Muon with its author's momentum and the best of four rates there."""

_LARGEST_GRADIENT = 1.0
_LEARNING_RATE_OF_BIASES = 1e-3
"""Of AdamW beside Muon, which is for matrices only."""
_WARM_UP_OF_ADAM = 0.2


class TorchOptimizer(LensOptimizer):
    """SGD with Nesterov momentum, AdamW, or Muon with AdamW for the biases.

    From the logit lens, with a gradient clipped to length 1 and a rate that falls to 0.

    Args:
        lens: where the steps start.
        name: sgd, adamw or muon.
        learning_rate, momentum, weight_decay: its settings.
    """

    def __init__(
        self,
        lens: TunedLens,
        name: str,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.lens = lens
        self._warm_up = _WARM_UP_OF_ADAM if name == "adamw" else 0.0
        rate, decay = learning_rate, weight_decay
        weights = [translator.weight for translator in _translators(lens)]
        biases = [translator.bias for translator in _translators(lens)]
        optimizers: list[torch.optim.Optimizer] = []
        if name == "sgd":
            optimizers += [
                torch.optim.SGD(
                    [*weights, *biases], rate, momentum, nesterov=momentum > 0, weight_decay=decay
                )
            ]
        if name == "muon":
            optimizers += [torch.optim.Muon(weights, rate, decay, momentum)]
        if name in ("adamw", "muon"):
            betas = (momentum, 0.999)
            parameters = biases if name == "muon" else [*weights, *biases]
            rate_of_adam = _LEARNING_RATE_OF_BIASES if name == "muon" else rate
            optimizers += [torch.optim.AdamW(parameters, rate_of_adam, betas, weight_decay=decay)]
        self._optimizers = optimizers
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    def step(self, active: Sequence[bool], share_done: float) -> None:
        for layer, translator in enumerate(_translators(self.lens)):
            if not active[layer]:
                translator.zero_grad()
        nn.utils.clip_grad_norm_(self.lens.parameters(), _LARGEST_GRADIENT)
        rising = (share_done + 1e-3) / self._warm_up if self._warm_up else 1.0
        factor = min(rising, (1 - share_done) / (1 - self._warm_up))
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()

    def result(self) -> TunedLens:
        return self.lens

    def state(self) -> dict[str, Tensor]:
        tensors = {f"lens.{name}": value for name, value in self.lens.state_dict().items()}
        for index, optimizer in enumerate(self._optimizers):
            tensors |= _optimizer_state(str(index), optimizer)
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        own = {name: state[f"lens.{name}"] for name in self.lens.state_dict()}
        self.lens.load_state_dict(own)
        for index, optimizer in enumerate(self._optimizers):
            _load_optimizer_state(str(index), optimizer, state)


def _translators(lens: TunedLens) -> list[Translator]:
    return [one.translator for one in lens.all_translators()]


def _columns(lens: TunedLens) -> Float[Tensor, "layers d_model d_model_plus_1"]:
    """`[A b]` of every layer."""
    parts = [torch.cat([t.weight.data, t.bias.data[:, None]], 1) for t in _translators(lens)]
    return torch.stack(parts)


def _gradients(lens: TunedLens) -> Float[Tensor, "layers d_model d_model_plus_1"]:
    """Of `[A b]` of every layer; 0 where a layer took no part."""
    parts = []
    for translator in _translators(lens):
        weight, bias = translator.weight.grad, translator.bias.grad
        if weight is None or bias is None:
            weight, bias = torch.zeros_like(translator.weight), torch.zeros_like(translator.bias)
        parts.append(torch.cat([weight, bias[:, None]], 1))
    return torch.stack(parts)


def _optimizer_state(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{parameter}.{key}": value
        for parameter, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer_state(
    name: str, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    found: dict[int, dict[str, Tensor]] = {}
    for full, value in state.items():
        owner, _, rest = full.partition(".")
        if owner == name:
            parameter, key = rest.split(".")
            found.setdefault(int(parameter), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": found, "param_groups": groups})
