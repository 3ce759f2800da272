"""Finds the parts of a model: blocks, final norm, attention, MLP and its output projection."""

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunedlens.errors import InputError

_ATTENTION_NAMES = ("attn", "attention")
_MLP_NAMES = ("mlp", "feed_forward", "ffn")
_OTHER_NAMES = ("norm", "ln", "dropout")


def find_blocks_and_final_norm(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """The list of n blocks, and the last norm among the modules beside that list.

    Raises:
        InputError: the model has no such list and norm, or no unembedding.
    """
    n_layers = getattr(model.config, "num_hidden_layers", None)
    for parent in model.base_model.modules():
        for blocks in parent.children():
            if isinstance(blocks, nn.ModuleList) and len(blocks) == n_layers:
                norms = [m for m in parent.children() if _is_norm(m, model.config.hidden_size)]
                if norms and model.get_output_embeddings() is not None:
                    return blocks, norms[-1]
    raise InputError(
        f"{type(model).__name__}: found no list of {n_layers} blocks with a final norm beside "
        "it and an unembedding; this architecture is not supported"
    )


def find_attention_and_mlp(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two parts of a block, found by their names.

    Raises:
        InputError: the block does not have exactly one of each.
    """
    return _child_named(block, _ATTENTION_NAMES), _child_named(block, _MLP_NAMES)


def find_output_projection(mlp: nn.Module, d_model: int) -> nn.Linear | Conv1D | None:
    """The last linear map in an MLP that writes to the residual stream, if there is one."""
    projections = [
        module
        for module in mlp.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and output_rows(module).shape[1] == d_model
    ]
    return projections[-1] if projections else None


def output_rows(projection: nn.Linear | Conv1D) -> Tensor:
    """The weight with one row per input. Conv1D stores it so, Linear stores the transpose."""
    return projection.weight if isinstance(projection, Conv1D) else projection.weight.mT


def _child_named(block: nn.Module, names: tuple[str, ...]) -> nn.Module:
    children = [
        child
        for name, child in block.named_children()
        if any(part in name for part in names) and not any(part in name for part in _OTHER_NAMES)
    ]
    if len(children) != 1:
        raise InputError(
            f"{type(block).__name__}: expected one {names[0]} in the block, found "
            f"{len(children)}; sites within a block are not supported for this architecture"
        )
    return children[0]


def _is_norm(module: nn.Module, d_model: int) -> bool:
    shapes = {tuple(parameter.shape) for parameter in module.parameters()}
    return shapes == {(d_model,)}
