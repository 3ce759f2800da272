"""Writes an MLP as a sum over neurons of a coefficient times an output vector."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.model.fsdp import whole
from tunedlens.model.structure import find_output_projection, output_rows


def neuron_activations(
    mlp: nn.Module, d_model: int, run: Callable[[], object]
) -> tuple[Float[Tensor, "batch seq d_mlp"], Float[Tensor, "d_mlp d_model"]] | None:
    """Coefficients and output vectors of the neurons, or None if the MLP is not such a sum.

    Args:
        run: runs the model that the MLP belongs to.
    """
    projection = find_output_projection(mlp, d_model)
    if projection is None:
        return None
    captured: dict[str, object] = {}

    def keep_input(_module: nn.Module, args: tuple[object, ...]) -> None:
        captured["coefficients"] = args[0]

    def keep_output(_module: nn.Module, _args: tuple[object, ...], output: object) -> None:
        captured["output"] = output

    with ExitStack() as hooks:
        hooks.enter_context(projection.register_forward_pre_hook(keep_input))
        hooks.enter_context(mlp.register_forward_hook(keep_output))
        run()
    coefficients, output = captured.get("coefficients"), captured.get("output")
    if not isinstance(coefficients, Tensor) or not isinstance(output, Tensor):
        return None
    with align_module_device(projection):
        vectors, bias = whole(output_rows(projection)), projection.bias
        total = coefficients @ vectors + (0 if bias is None else whole(bias))
    tolerance = 16 * torch.finfo(total.dtype).eps * total.abs().max()
    return (coefficients, vectors) if (total - output).abs().max() <= tolerance else None
