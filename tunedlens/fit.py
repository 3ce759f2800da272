"""How translators are fitted: a closed form to start from, then steps.

The closed form is the least-squares map from a layer's state to the final one. It needs
no pass through the vocabulary and spares the steps most of their way, and the sums that it
is made of tell the steps what size each input has.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.config import TrainConfig
from tunedlens.lens import Translator, TunedLens


class LeastSquares:
    """The affine map from every layer's state to the final state, in one pass.

    Sums stream in float64, whatever the number of batches and processes.

    Args:
        n_layers: number of states to map.
        d_model: their width.
    """

    def __init__(self, n_layers: int, d_model: int) -> None:
        width = d_model + 1  # the last input is always 1, so that the bias is one more column
        self.inputs = torch.zeros(n_layers, width, width, dtype=torch.float64)
        self.outputs = torch.zeros(n_layers, width, d_model, dtype=torch.float64)

    def add(
        self,
        hidden: Float[Tensor, "layers tokens d_model"],
        final: Float[Tensor, "tokens d_model"],
    ) -> None:
        """Count further tokens."""
        inputs = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        self.inputs += (inputs.mT @ inputs).double().cpu()
        self.outputs += (inputs.mT @ (final - hidden)).double().cpu()

    @property
    def second_moment(self) -> Float[Tensor, "layers d_model_plus_1 d_model_plus_1"]:
        """Mean of x xᵀ over tokens, the last of x being 1."""
        return self.inputs / self.inputs[:, -1:, -1:]

    def solve(self, ridge: float) -> Float[Tensor, "layers d_model_plus_1 d_model"]:
        """`A` transposed with `b` below it, of h + A h + b, for every layer.

        Args:
            ridge: pulls towards 0, which is the logit lens; relative to the mean square of
                the inputs.
        """
        strength = ridge * self.inputs.diagonal(dim1=-2, dim2=-1).mean(-1)
        identity = torch.eye(self.inputs.shape[-1], dtype=torch.float64)
        return torch.linalg.solve(self.inputs + strength[:, None, None] * identity, self.outputs)


class MuonFit:
    """Muon on whitened inputs, with a learning rate that falls linearly to 0.

    A few directions of the residual stream carry most of its variance, so a step that is
    even in the translator's own coordinates is far from even in what it changes. The
    parameters here are `V = [A b] S`, one matrix a layer, with `S` the square root of the
    inputs' second moment (the bias is the column of an input that is always 1): for them
    all inputs have the same size. Decaying `V` pulls towards the logit lens.

    A step depends on its index, the total and `state` alone, so that a run which goes on
    from a saved state takes the steps that it would have taken.

    Args:
        lens: whose translators are fitted.
        config: learning rate, momentum, weight decay, ridge.
        total_steps: steps until the learning rate reaches 0.

    Source:
        Jordan et al. 2024, "Muon", kellerjordan.github.io/posts/muon; the step is scaled
        to the size of AdamW's as in Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(self, lens: TunedLens, config: TrainConfig, total_steps: int) -> None:
        self._translators = [cast(Translator, translator) for translator in lens.translators]
        self._learning_rate = config.lr
        self._ridge = config.ridge
        self._total_steps = total_steps
        device, d_model = lens.unembedding.weight.device, lens.identity.d_model
        identity = torch.eye(d_model + 1, device=device)
        self._inverse_roots = identity.repeat(lens.n_layers, 1, 1)
        self._whitened = [nn.Parameter(self._columns(layer)) for layer in range(lens.n_layers)]
        self._optimizer = torch.optim.Muon(
            self._whitened,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )

    def start(self, first_pass: LeastSquares, translators_too: bool = True) -> None:
        """Take the whitening from a first pass over the text, and the translators as well."""
        values, vectors = torch.linalg.eigh(first_pass.second_moment)
        values = values.clamp(min=0) + self._ridge * values.mean(-1, keepdim=True)
        inverse_roots = (vectors * values.rsqrt()[:, None]) @ vectors.mT
        roots = (vectors * values.sqrt()[:, None]) @ vectors.mT
        self._inverse_roots.copy_(inverse_roots)
        if translators_too:
            solution = first_pass.solve(self._ridge).mT
        else:
            current = [self._columns(layer) for layer in range(len(self._translators))]
            solution = torch.stack(current).double().cpu()
        for layer, whitened in enumerate((solution @ roots).float()):
            self._whitened[layer].data.copy_(whitened)
            self._write_back(layer)

    def step(self, index: int) -> None:
        """Take step number `index` with the gradients that are there, and clear them."""
        for layer, translator in enumerate(self._translators):
            assert translator.weight.grad is not None  # the caller has gone backward
            assert translator.bias.grad is not None
            gradient = torch.cat([translator.weight.grad, translator.bias.grad[:, None]], 1)
            self._whitened[layer].grad = gradient @ self._inverse_roots[layer]
            translator.zero_grad()
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * (1 - index / self._total_steps)
        self._optimizer.step()
        for layer in range(len(self._translators)):
            self._write_back(layer)

    def state(self) -> dict[str, Float[Tensor, "..."]]:
        """What the next step depends on besides the translators."""
        tensors = {f"whitened.{layer}": value.data for layer, value in enumerate(self._whitened)}
        for layer, values in self._optimizer.state_dict()["state"].items():
            tensors[f"momentum.{layer}"] = values["momentum_buffer"]
        return tensors | {"inverse_roots": self._inverse_roots}

    def load_state(self, state: dict[str, Float[Tensor, "..."]]) -> None:
        """Go on from what `state` gave."""
        self._inverse_roots.copy_(state["inverse_roots"])
        momentum = {}
        for layer, whitened in enumerate(self._whitened):
            whitened.data.copy_(state[f"whitened.{layer}"])
            if f"momentum.{layer}" in state:
                momentum[layer] = {"momentum_buffer": state[f"momentum.{layer}"]}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": momentum, "param_groups": groups})

    def _columns(self, layer: int) -> Float[Tensor, "d_model d_model_plus_1"]:
        translator = self._translators[layer]
        return torch.cat([translator.weight.data, translator.bias.data[:, None]], 1)

    def _write_back(self, layer: int) -> None:
        columns = self._whitened[layer].data @ self._inverse_roots[layer]
        self._translators[layer].weight.data.copy_(columns[:, :-1])
        self._translators[layer].bias.data.copy_(columns[:, -1])
