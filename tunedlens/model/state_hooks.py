"""Hooks that read the states of the residual stream and may replace them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from torch import Tensor, nn

from tunedlens.model.sites import (
    Args,
    Kwargs,
    input_state,
    output_state,
    replace_input_state,
    replace_output_state,
)
from tunedlens.model.structure import ModelParts

See = Callable[[Tensor], Tensor | None]
"""A function that is called with a state. If it returns a tensor, this replaces the state."""


def on_state(parts: ModelParts, layer: int, see: See) -> AbstractContextManager[object]:
    """Call a function with a state in every run, until the hooks are closed.

    Args:
        layer: the layer of the state, from 0 to n. The state of layer n follows the last block.
    """
    if layer == len(parts.blocks):
        return _on_final_state(parts, see)
    return parts.blocks[layer].register_forward_pre_hook(_on_input(see), with_kwargs=True)


def _on_input(see: See) -> Callable[[nn.Module, Args, Kwargs], tuple[Args, Kwargs] | None]:
    def hook(_module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        replacement = see(input_state(args, kwargs))
        return None if replacement is None else replace_input_state(args, kwargs, replacement)

    return hook


def _on_final_state(parts: ModelParts, see: See) -> AbstractContextManager[object]:
    last_block = parts.blocks[-1]

    def on_output(_block: nn.Module, _args: Args, output: object) -> object:
        replacement = see(output_state(output))
        return None if replacement is None else replace_output_state(output, replacement)

    if parts.entry is None:
        return last_block.register_forward_hook(on_output)
    is_due: list[bool] = []

    def on_input(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if not is_due:  # some models apply their final norm to the embeddings too
            return None
        is_due.clear()
        return _on_input(see)(module, args, kwargs)

    hooks = ExitStack()
    hooks.enter_context(last_block.register_forward_hook(lambda *_: is_due.append(True)))
    hooks.enter_context(parts.entry.register_forward_pre_hook(on_input, with_kwargs=True))
    return hooks
