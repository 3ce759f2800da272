"""Models whose weights are divided among processes: FSDP of torch, planned by transformers."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from tunedlens.distributed import join_processes, together
from tunedlens.errors import InputError
from tunedlens.model.structure import ModelParts, find_parts

_TOLERANCE = 0.02
"""Of buffers that are computed in bfloat16."""


def has_plan(model: PreTrainedModel, parts: ModelParts) -> bool:
    """Whether transformers knows how to divide the blocks of an architecture among processes."""
    names = {module: name for name, module in model.named_modules()}
    return f"{names[parts.blocks]}.*" in (model.fsdp_plan or {})


def division(model: PreTrainedModel, parts: ModelParts, name: str) -> dict[str, object]:
    """How `from_pretrained` divides the weights of a model among the processes.

    Args:
        model: the architecture; it needs no weights.

    Raises:
        InputError: there is one process only, or the model cannot be divided.
    """
    processes, reason = join_processes().num_processes, None
    if processes == 1:
        reason = "there is one (torchrun starts several)"
    elif getattr(model.config, "quantization_config", None) is not None:
        reason = f"the weights of {name} are quantised"
    elif not has_plan(model, parts):
        reason = f"transformers has no plan for the blocks of {type(model).__name__}"
    if reason is not None:
        raise InputError(
            f"--fsdp divides the weights among processes, but {reason}; --device-map auto spreads "
            "them over the devices of one process"
        )
    return {"distributed_config": DistributedConfig(fsdp_size=processes)}


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are divided among processes."""
    return any(isinstance(part, FSDPModule) for part in model.modules())


def whole(value: Tensor) -> Tensor:
    """A tensor that may be divided among processes. If it is, all of them take part."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_parts(
    model: PreTrainedModel, parts: ModelParts, blocks: str | None, final_norm: str | None
) -> ModelParts:
    """The parts of a model with whole weights in the final norm and the head, and none elsewhere.

    All processes take part. The modules are new: those of the model cannot be copied, and have
    hooks that gather their weights.

    Raises:
        InputError: transformers has left a buffer of the model without values.
    """
    skeleton = _without_weights(model)
    together(lambda: _require_buffers(model, skeleton))
    found = find_parts(skeleton, blocks, final_norm)
    for new, old in ((found.final_norm, parts.final_norm), (found.head, parts.head)):
        values = {name: whole(value) for name, value in old.state_dict().items()}
        new.load_state_dict(values, assign=True)
    return found


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model as it was before FSDP: with its buffers, and with weights on the meta device."""
    kinds = (kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    kind = cast("type[PreTrainedModel]", next(kinds))
    with torch.device("meta"):
        skeleton = kind(model.config)
    for module in skeleton.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
    skeleton.initialize_weights()
    return skeleton


def _require_buffers(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Check the buffers that are in no file.

    transformers 5.24 takes the classes of FSDP for custom code, for which it leaves out a part of
    the initialisation. In Falcon-H1, buffers of the blocks are then memory that nobody has written.
    """
    expected = dict(skeleton.named_non_persistent_buffers())
    for name, buffer in model.named_non_persistent_buffers():
        if not torch.allclose(buffer.float().cpu(), expected[name].float(), rtol=_TOLERANCE):
            raise InputError(
                f"--fsdp does not work with {type(skeleton).__name__}: transformers leaves {name} "
                "without values; --device-map auto spreads the model over devices in one process"
            )
