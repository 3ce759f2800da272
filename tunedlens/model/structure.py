"""Finds the parts of a model: blocks, final norm, head, attention and MLP."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunedlens.errors import InputError
from tunedlens.model.quantised import is_plain

_MIXER_NAMES = ("attn", "attention", "mamba", "mixer", "temporal", "conv")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "moe", "fc1")
_OTHER_NAMES = ("norm", "ln", "dropout")

# The functions that a model applies to its logits are not visible in its modules. These keys of its
# config declare them.
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class ModelParts:
    """The parts of a causal language model that a lens needs."""

    blocks: nn.ModuleList
    """The n blocks of the residual stream."""
    final_norm: nn.Module
    """The modules between the last block and the head: usually a norm, in some models also a
    projection, and in some models nothing (an empty sequence)."""
    entry: nn.Module | None
    """The module that reads the last state; None if the head reads it."""
    head: nn.Module
    """The linear map to raw logits."""
    logit_scale: float
    """The model multiplies its logits by this."""
    logit_cap: float | None
    """The model's logits are `cap * tanh(logits / cap)`."""


def find_parts(
    model: PreTrainedModel, blocks: str | None = None, final_norm: str | None = None
) -> ModelParts:
    """Find the parts by the structure of the model, or at given paths.

    Args:
        blocks: the path of the list of blocks in the model, such as `model.layers`.
        final_norm: the path of the final norm, such as `model.norm`, or `none` for a model
            without one.

    Raises:
        InputError: the model has no such parts.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__} has an encoder and a decoder; expected a causal language model"
        )
    if head is None:
        raise InputError(
            f"{type(model).__name__} has no unembedding; expected a causal language model"
        )
    stack, rest = _find_blocks(model, config, blocks)
    if final_norm is None:
        after = _find_after_blocks(model, config, rest, head)
    else:
        after = [] if final_norm == "none" else [_submodule(model, final_norm)]
    scale = 1.0
    for key, power in [(key, 1) for key in _FACTORS] + [(key, -1) for key in _DIVISORS]:
        scale *= float(getattr(config, key, None) or 1.0) ** power
    cap = next((value for key in _CAPS if (value := getattr(config, key, None))), None)
    norm = after[0] if len(after) == 1 else nn.Sequential(*after)
    return ModelParts(stack, norm, after[0] if after else None, head, scale, cap)


def find_attention_and_mlp(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two parts of a block, found by their names.

    Raises:
        InputError: the block does not have exactly one of each.
    """
    mixer, mlp = _child_named(block, _MIXER_NAMES), _child_named(block, _MLP_NAMES)
    return block.get_submodule(mixer), block.get_submodule(mlp)


def mixer_name(block: nn.Module) -> str:
    """The name of the child that mixes positions, usually attention.

    Raises:
        InputError: the block does not have exactly one.
    """
    return _child_named(block, _MIXER_NAMES)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def find_output_projection(mlp: nn.Module, d_model: int) -> nn.Linear | Conv1D | None:
    """The last linear map in an MLP that writes to the residual stream, if there is one."""
    projections = [
        module
        for module in mlp.modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and is_plain(module.weight)
        and output_rows(module).shape[1] == d_model
    ]
    return projections[-1] if projections else None


def output_rows(projection: nn.Linear | Conv1D) -> Tensor:
    """The weight with one row per input. Conv1D stores it so, Linear stores the transpose."""
    return projection.weight if isinstance(projection, Conv1D) else projection.weight.mT


def _find_blocks(
    model: PreTrainedModel, config: PretrainedConfig, path: str | None
) -> tuple[nn.ModuleList, list[nn.Module]]:
    """The list of blocks, and the modules beside it."""
    n_layers = getattr(config, "num_hidden_layers", None)
    if path is not None:
        stack = _submodule(model, path)
        if not isinstance(stack, nn.ModuleList):
            raise InputError(
                f"{path} in {type(model).__name__} is a {type(stack).__name__}; expected the "
                "list of blocks (a ModuleList)"
            )
        parent = model.get_submodule(path.rpartition(".")[0])
        return stack, [child for child in parent.children() if child is not stack]
    for parent in model.base_model.modules():
        children = list(parent.children())
        for stack in children:
            if isinstance(stack, nn.ModuleList) and len(stack) == n_layers:
                return stack, [child for child in children if child is not stack]
    count = f"{n_layers} " if n_layers else ""
    raise InputError(
        f"{type(model).__name__}: found no list of {count}blocks; if there is one, give its path, "
        "as in --blocks model.layers"
    )


def _find_after_blocks(
    model: PreTrainedModel, config: PretrainedConfig, rest: list[nn.Module], head: nn.Module
) -> list[nn.Module]:
    """The modules that the model applies between its last block and its head, in order."""
    width, read = config.hidden_size, _input_width(head)
    found = [module for module in rest if _is_final_norm(module, width)][-1:]
    if read != width:
        maps = [m for m in rest if isinstance(m, nn.Linear) and m.out_features == read]
        if not maps:
            raise InputError(
                f"{type(model).__name__}: the head reads {read} dimensions and the blocks write "
                f"{width}; found no linear map between them, so the model cannot be decoded"
            )
        found.append(maps[-1])
    return found


def _input_width(head: nn.Module) -> int:
    return int(getattr(head, "in_features", None) or head.weight.shape[1])  # type: ignore[index]


def _is_final_norm(module: nn.Module, width: int) -> bool:
    shapes = {tuple(parameter.shape) for parameter in module.parameters()}
    return shapes == {(width,)} or (not shapes and is_norm(module))


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in model.named_children())
        raise InputError(
            f"{type(model).__name__} has no module {path}; its modules begin with {names}"
        ) from error


def _child_named(block: nn.Module, names: tuple[str, ...]) -> str:
    children = [
        name
        for name, _ in block.named_children()
        if any(part in name for part in names) and not any(part in name for part in _OTHER_NAMES)
    ]
    if len(children) != 1:
        raise InputError(
            f"{type(block).__name__}: expected one {' or '.join(names[:2])} in the block, found "
            f"{len(children)}; sites within a block are not supported for this architecture"
        )
    return children[0]
