"""Captures the residual stream and its terms inside every block, with forward hooks."""

from collections.abc import Collection
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from tunedlens.errors import InputError
from tunedlens.model.structure import find_attention_and_mlp

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""The sites of a block, in the order in which it computes them: the stream entering the block,
what attention adds, the stream between attention and MLP, what the MLP adds, the stream leaving
the block."""

Args = tuple[object, ...]
Kwargs = dict[str, object]


def input_state(args: Args, kwargs: Kwargs) -> Tensor:
    """The hidden states that a block is called with, by position or by name."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def replace_input_state(args: Args, kwargs: Kwargs, hidden: Tensor) -> tuple[Args, Kwargs]:
    """The arguments of a block with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


class BlockSites:
    """The sites of one block: captured while it runs, checked when it is done.

    Args:
        name: what messages call the block.
        wanted: the names from `SITES` to keep.
    """

    def __init__(self, block: nn.Module, name: str, wanted: Collection[str]) -> None:
        self._block = block
        self._attention, self._mlp = find_attention_and_mlp(block)
        self._name = name
        self._wanted = wanted
        self._part_inputs: list[Tensor] = []  # the inputs of parts that run after attention
        self.captured: dict[str, Tensor] = {}

    def register(self, hooks: ExitStack) -> None:
        """Capture the sites whenever the block runs, until the hooks are closed."""
        block = self._block
        for part in block.children():
            hooks.enter_context(part.register_forward_pre_hook(self._enter_part))
        hooks.enter_context(block.register_forward_pre_hook(self._enter, with_kwargs=True))
        hooks.enter_context(self._attention.register_forward_hook(self._leave_attention))
        hooks.enter_context(self._mlp.register_forward_hook(self._leave_mlp))
        hooks.enter_context(block.register_forward_hook(self._leave))

    def _enter(self, _block: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.captured = {"resid_pre": input_state(args, kwargs)}

    def _enter_part(self, _part: nn.Module, args: Args) -> None:
        if "attn_out" in self.captured and args and isinstance(args[0], Tensor):
            self._part_inputs.append(args[0])

    def _leave_attention(self, _module: nn.Module, _args: Args, output: object) -> None:
        self.captured["attn_out"] = _first_tensor(output)

    def _leave_mlp(self, _module: nn.Module, _args: Args, output: object) -> None:
        self.captured["mlp_out"] = _first_tensor(output)

    def _leave(self, _block: nn.Module, _args: Args, output: object) -> None:
        sites, inputs, end = self.captured, self._part_inputs, _first_tensor(output)
        self._part_inputs = []
        middle = sites["resid_pre"] + sites["attn_out"]
        tolerance = 16 * torch.finfo(end.dtype).eps * end.abs().max()

        def agree(one: Tensor, other: Tensor) -> bool:
            return one.shape == other.shape and bool((one - other).abs().max() <= tolerance)

        if not agree(middle + sites["mlp_out"], end):
            raise InputError(
                f"{self._name} is not its input plus attention plus MLP, so it has no terms to "
                "read; ask for resid_pre and resid_post"
            )
        if "resid_mid" in self._wanted and not any(agree(middle, one) for one in inputs):
            raise InputError(
                f"{self._name} runs attention and MLP side by side, so there is no resid_mid "
                "between them; ask for other sites"
            )
        sites |= {"resid_mid": middle, "resid_post": end}
        self.captured = {site: sites[site] for site in self._wanted}


def _first_tensor(output: object) -> Tensor:
    """The states in a module's output, which attention and some blocks wrap in a tuple."""
    output = output[0] if isinstance(output, tuple) else output
    assert isinstance(output, Tensor)
    return output
