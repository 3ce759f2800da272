"""Hooks at every site of the residual stream that may replace its states."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from tunedlens.errors import InputError
from tunedlens.model import FrozenModel, HookPoint
from tunedlens.model.self_check import check_ids
from tunedlens.model.sites import (
    Args,
    Kwargs,
    input_state,
    output_state,
    replace_output_state,
)
from tunedlens.model.state_hooks import See, on_state


def find_stream(
    model: FrozenModel, point: HookPoint
) -> Callable[[See], AbstractContextManager[object]]:
    """A function that adds hooks on the states at a point; a hook may replace them.

    Raises:
        InputError: the states are not the output of a module, so they cannot be replaced.
    """
    site, layer = point
    if site == "resid_post":
        site, layer = "resid_pre", layer + 1
    if site == "resid_pre":
        return partial(on_state, model.parts, layer)
    term = "attn_out" if site == "resid_mid" else site
    return partial(_on_term, model.blocks[layer], _writer(model, layer, term), site == "resid_mid")


def _on_term(
    block: nn.Module, writer: nn.Module, is_middle: bool, see: See
) -> AbstractContextManager[object]:
    """Hook a term, or the stream after attention, which is replaced by replacing that term."""
    start: list[Tensor] = []

    def enter(_block: nn.Module, args: Args, kwargs: Kwargs) -> None:
        start[:] = [input_state(args, kwargs).clone()]  # some blocks add in place

    def write(_part: nn.Module, _args: Args, output: object) -> object:
        added = output_state(output)
        before = start[0].to(added.device) if is_middle else torch.zeros_like(added)
        replacement = see(before + added)
        return None if replacement is None else replace_output_state(output, replacement - before)

    hooks = ExitStack()
    hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
    hooks.enter_context(writer.register_forward_hook(write))
    return hooks


def _writer(model: FrozenModel, layer: int, term: str) -> nn.Module:
    """The part of a block whose output is added to the stream as `attn_out` or `mlp_out`."""
    written: list[tuple[nn.Module, Tensor]] = []

    def keep(part: nn.Module, _args: Args, output: object) -> None:
        output = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(output, Tensor):
            written.append((part, output.clone()))

    ids = check_ids(model.identity.vocab_size, model.context).to(model.device)
    with ExitStack() as hooks:
        for part in model.blocks[layer].children():
            hooks.enter_context(part.register_forward_hook(keep))
        added = model.sites(ids, wanted=[term])[term][layer]
    for part, output in reversed(written):
        if output.shape == added.shape and torch.equal(output.to(added.device), added):
            return part
    raise InputError(
        f"no module of block {layer} of {model.name} has its {term} as output, so it cannot be "
        "replaced; use resid_pre or resid_post"
    )
