"""Optimizers of the KL: the default one, and the published baselines."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.devices import send
from tunedlens.fit.least_squares import LeastSquares, Translators
from tunedlens.fit.low_rank import nearest_of_rank
from tunedlens.lenses import AffineLens

Matrices = Float[Tensor, "layers rows columns"]
_DAMPING = 1e-4
"""Added to the eigenvalues of the second moment, relative to their mean."""
_AVERAGING_POWER = 2
"""The weight of step t in the average grows about as t to this power."""


class LensOptimizer(ABC):
    """Turns gradients into a lens.

    A step depends on the gradients and on `state` alone, so a run that continues from a saved
    state takes the same steps as an uninterrupted one.
    """

    lens: AffineLens
    """The lens at which the next gradients are taken."""

    @abstractmethod
    def step(self, active: Sequence[bool], fraction_done: float) -> None:
        """Take a step with the accumulated gradients, and clear them.

        Args:
            active: for every layer, whether it is still trained.
            fraction_done: how much of the budget is used up, from 0 to 1.
        """

    @abstractmethod
    def result(self) -> AffineLens:
        """The lens as it would be if this were the last step."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that the next step and the result depend on."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state that `state` returned."""


def preconditioner(second_moment: Matrices) -> Matrices:
    """The inverse fourth root of the inputs' second moment, which whitens them halfway.

    It is damped, and scaled so that the preconditioned inputs have mean square 1.
    """
    values, vectors = torch.linalg.eigh(second_moment)
    values = values.clamp(min=0) + _DAMPING * values.mean(-1, keepdim=True)
    inverse_roots = values.pow(-0.25) / values.sqrt().mean(-1, keepdim=True).sqrt()
    return (vectors * inverse_roots[:, None]) @ vectors.mT


class PreconditionedMuon(LensOptimizer):
    """Muon with a half-whitening input preconditioner, a constant step size and iterate averaging.

    A few directions of the residual stream carry most of its variance, so a step that is equally
    large in all coordinates of the translator changes the translated states very unequally. This
    optimizer writes `[A b] = initial + M P`, where P is the inverse fourth root of the inputs'
    second moment, and takes its steps in M. P whitens only halfway, because directions that few
    tokens use also matter less.

    The step size is constant, relative to the error that least squares leave in the final state.
    Averaging over the last part of the iterates, which grows with their number, removes the noise,
    so the result is a good lens at any time: the number of steps need not be known beforehand.

    Args:
        lens: the initial lens, unless `initialise` is called.
        step_size: change of a translated state in one step, relative to the root mean
            square error of least squares.
        weight_decay: pulls towards the initial lens.
        dtype: the dtype of the products in the orthogonalisation.
        rank: the largest rank of a translator in the result. The steps change translators of full
            rank, with the gradient at the nearest translators of this rank.

    Source:
        Jordan et al. 2024, "Muon", kellerjordan.github.io/posts/muon; Shamir and Zhang
        2013, arXiv:1212.1824, section 4, for the average.
    """

    def __init__(
        self,
        lens: AffineLens,
        step_size: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        rank: int | None = None,
    ) -> None:
        self.lens, self._dtype = lens, dtype
        shape = (lens.sites, lens.layers, rank)
        self._average = type(lens)(lens.unembedding, lens.identity, *shape)
        self._step_size, self._momentum, self._weight_decay = step_size, momentum, weight_decay
        initial = _columns(lens)
        width = initial.shape[-1]
        self._state = {
            "initial": initial,
            "preconditioner": torch.eye(width, device=initial.device).repeat(len(initial), 1, 1),
            "initial_error": initial.new_ones(len(initial)),
            "iterate": torch.zeros_like(initial),
            "average": torch.zeros_like(initial),
            "momentum": torch.zeros_like(initial),
            "steps": initial.new_zeros(len(initial)),
        }
        if rank is not None:
            self._state["second_moment"] = self._state["preconditioner"].clone()

    def initialise(
        self,
        first_pass: LeastSquares,
        solution: Translators,
        *,
        from_solution: bool = True,
        bias_only: bool = False,
    ) -> None:
        """Take the preconditioner, the scale of the steps and the initial lens from least squares.

        Args:
            first_pass: the sums over the first part of the text.
            solution: the solution of `first_pass`.
            from_solution: whether to start from the solution, or from the current lens.
            bias_only: whether the steps change the biases only.
        """
        second_moment = first_pass.second_moment
        if "second_moment" in self._state:
            self._state["second_moment"].copy_(second_moment)
        matrices = preconditioner(second_moment)
        if bias_only:
            # A direction of one column has one singular value instead of d_model; this keeps
            # the size of a step.
            matrices = torch.zeros_like(matrices)
            matrices[:, -1, -1] = matrices.shape[-1] ** 0.5
        self._state["preconditioner"].copy_(matrices)
        error = first_pass.mean_square_error(solution).clamp(min=0).sqrt()
        self._state["initial_error"].copy_(error)
        if from_solution:
            self._state["initial"].copy_(solution)
        self._write()

    def revert(self, layer: int) -> None:
        """Make the result of one layer its initial translator."""
        self._state["average"][layer].zero_()

    def step(self, active: Sequence[bool], fraction_done: float) -> None:  # noqa: ARG002 - see class
        state = self._state
        learning = [layer for layer, learns in enumerate(active) if learns]
        # With a list as the index, the GPU would have to wait for a copy of it.
        layers = (
            slice(None) if all(active) else send(torch.tensor(learning), state["iterate"].device)
        )
        gradient = translator_gradients(self.lens)[layers] @ state["preconditioner"][layers]
        self.lens.zero_grad()
        momentum = state["momentum"][layers].lerp(gradient, 1 - self._momentum)
        nesterov = gradient.lerp(momentum, self._momentum)
        direction = _orthogonalised(nesterov, self._dtype)
        size = self._step_size * state["initial_error"][layers, None, None]
        iterate = state["iterate"][layers] * (1 - size * self._weight_decay) - size * direction
        state["momentum"][layers], state["iterate"][layers] = momentum, iterate
        state["steps"][layers] += 1
        weight = (_AVERAGING_POWER + 1) / (state["steps"][layers, None, None] + _AVERAGING_POWER)
        state["average"][layers] = state["average"][layers].lerp(iterate, weight)
        self._write()

    def result(self) -> AffineLens:
        columns, rank = self._columns("average"), self._average.rank
        if rank is None:
            _fill(self._average, weight=columns[..., :-1], bias=columns[..., -1])
        else:
            nearest = nearest_of_rank(columns, self._state["second_moment"], rank)
            _fill(self._average, **nearest._asdict())
        return self._average

    def state(self) -> dict[str, Tensor]:
        return self._state

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, value in self._state.items():
            value.copy_(state[name])
        self._write()

    def _columns(self, name: str) -> Translators:
        state = self._state
        return torch.baddbmm(state["initial"], state[name], state["preconditioner"])

    def _write(self) -> None:
        columns, rank = self._columns("iterate"), self._average.rank
        if rank is not None:
            nearest = nearest_of_rank(columns, self._state["second_moment"], rank)
            columns = torch.cat([nearest.left @ nearest.right, nearest.bias[..., None]], -1)
        _fill(self.lens, weight=columns[..., :-1], bias=columns[..., -1])


def _fill(lens: AffineLens, **values: Tensor) -> None:
    """Set the parameters of all translators, by name, from arrays with one entry per translator."""
    for index, translator in enumerate(lens.all_translators()):
        for name, value in values.items():
            translator.get_parameter(name).data.copy_(value[index])


def _orthogonalised(matrices: Matrices, dtype: torch.dtype) -> Matrices:
    """Every matrix with its singular values moved close to 1 (between about 0.7 and 1.2).

    Runs five Newton-Schulz iterations with the coefficients of the source. In bfloat16, a
    difference in the last digit of a gradient, for example from another order of summation, grows
    to 0.3 % of the result, because every iteration rounds.

    Source:
        Jordan et al. 2024, "Muon", kellerjordan.github.io/posts/muon.
    """
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.to(matrices.dtype)


DEFAULT_HYPERPARAMETERS = {
    "preconditioned": (0.035, 0.8, 0.0),
    "sgd": (0.1, 0.9, 1e-3),
    "muon": (0.04, 0.95, 0.0),
}
"""Learning rate, momentum and weight decay. Those of SGD are the defaults of tuned-lens 0.2.0,
although ten times its rate is better on the embedded model. Muon has its author's momentum and the
best of four rates on the embedded model."""

_MAX_GRADIENT_NORM = 1.0
_BIAS_LEARNING_RATE = 1e-3
"""The learning rate of AdamW, which updates the biases in Muon runs: Muon is for matrices only."""


class TorchOptimizer(LensOptimizer):
    """A published baseline: SGD with Nesterov momentum, or Muon with AdamW for the biases.

    It starts from the logit lens, clips the gradient to norm 1 and lowers the learning rate
    linearly to 0.

    Args:
        lens: the initial lens.
        name: sgd or muon.
    """

    def __init__(
        self,
        lens: AffineLens,
        name: str,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.lens = lens
        weights = [translator.weight for translator in lens.all_translators()]
        biases = [translator.bias for translator in lens.all_translators()]
        self._optimizers: list[torch.optim.Optimizer]
        if name == "muon":
            muon = torch.optim.Muon(weights, learning_rate, weight_decay, momentum)
            betas = (momentum, 0.999)
            adamw = torch.optim.AdamW(biases, _BIAS_LEARNING_RATE, betas, 1e-8, weight_decay)
            self._optimizers = [muon, adamw]
        else:
            both, nesterov = [*weights, *biases], momentum > 0
            sgd = torch.optim.SGD(both, learning_rate, momentum, 0, weight_decay, nesterov)
            self._optimizers = [sgd]
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]

    def step(self, active: Sequence[bool], fraction_done: float) -> None:
        for layer, translator in enumerate(self.lens.all_translators()):
            if not active[layer]:
                translator.zero_grad()
        nn.utils.clip_grad_norm_(self.lens.parameters(), _MAX_GRADIENT_NORM)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - fraction_done)
            optimizer.step()
            optimizer.zero_grad()

    def result(self) -> AffineLens:
        return self.lens

    def state(self) -> dict[str, Tensor]:
        tensors = {f"lens.{name}": value for name, value in self.lens.state_dict().items()}
        for index, optimizer in enumerate(self._optimizers):
            for parameter, values in optimizer.state_dict()["state"].items():
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        tensors[f"{index}.{parameter}.{key}"] = value
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        names = self.lens.state_dict()
        self.lens.load_state_dict({name: state[f"lens.{name}"] for name in names})
        for index, optimizer in enumerate(self._optimizers):
            values: dict[int, dict[str, Tensor]] = {}
            parameters = [part for group in optimizer.param_groups for part in group["params"]]
            for name, value in state.items():
                if name.startswith(f"{index}."):
                    _, parameter, key = name.split(".")
                    if value.ndim and value.shape != parameters[int(parameter)].shape:
                        raise ValueError(f"{name} has a wrong shape, {tuple(value.shape)}")
                    values.setdefault(int(parameter), {})[key] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": values})


def _columns(lens: AffineLens) -> Translators:
    """`[A b]` of every layer."""
    parts = [torch.cat([t.weight.data, t.bias.data[:, None]], 1) for t in lens.all_translators()]
    return torch.stack(parts)


def translator_gradients(lens: AffineLens) -> Translators:
    """The gradient of `[A b]` of every layer, 0 for a layer without one."""

    def gradient(parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    pairs = [(gradient(t.weight), gradient(t.bias)) for t in lens.all_translators()]
    return torch.stack([torch.cat([weight, bias[:, None]], 1) for weight, bias in pairs])
