"""Reads the weights of modules that may be quantised."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunedlens.errors import InputError


def is_plain(weight: object) -> bool:
    """Whether a weight is a tensor of floating-point numbers, and not packed or scaled."""
    return type(weight) in (Tensor, nn.Parameter, DTensor) and weight.is_floating_point()  # type: ignore[attr-defined]


def is_quantised(module: nn.Module) -> bool:
    """Whether a module or any part of it has quantised weights."""
    return any(_packed_weights(part) for part in module.modules())


def count_weights(module: nn.Module) -> int:
    """The number of parameters. Packed weights count as the parameters that they represent."""
    total = 0
    for part in module.modules():
        own, packed = dict(part.named_parameters(recurse=False)), _packed_weights(part)
        names = ["bias"] if packed else own
        total += packed + sum(own[name].numel() for name in names if name in own)
    return total


@torch.no_grad()
def read_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear map; of a quantised map, from its outputs for unit vectors.

    Raises:
        InputError: the map is not linear, because it rounds its inputs too.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if is_plain(weight):
        return weight.detach(), None if bias is None else bias.detach()  # type: ignore[union-attr]
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    width = int(module.in_features)  # type: ignore[arg-type]
    probe = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat([torch.zeros(1, width), probe, torch.eye(width)]).to(device)
    zero, expected, *units = module(inputs)
    weight = (torch.stack(units) - zero).T.contiguous()
    found = weight.float() @ inputs[1] + zero.float()
    tolerance = max(1e-3, 8 * torch.finfo(zero.dtype).eps)
    if (found - expected.float()).abs().max() > tolerance * expected.abs().max():
        raise InputError(
            f"the unembedding, a quantised {type(module).__name__}, rounds its inputs as well as "
            "its weights, so it cannot be decoded; leave it out of the quantisation"
        )
    return weight, zero


def _packed_weights(module: nn.Module) -> int:
    """The number of weights of a quantised linear map, by its sizes; 0 for other modules."""
    read, written = (getattr(module, name, None) for name in ("in_features", "out_features"))
    is_linear = isinstance(read, int) and isinstance(written, int)
    return read * written if is_linear and not is_plain(getattr(module, "weight", None)) else 0  # type: ignore[operator]
