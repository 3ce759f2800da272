"""Where a block can be looked into, found by structure and kept by hooks."""

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tunedlens.errors import InputError

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Where a block can be looked into, in the order in which it computes: the stream entering it,
what attention adds, the stream between, what the MLP adds, the stream leaving it."""


class BlockSites:
    """What one block does to the stream: kept while it runs, checked when it is done.

    Args:
        block: the block.
        name: what to call it in messages.
        wanted: the sites to keep, of `SITES`.
    """

    def __init__(self, block: nn.Module, name: str, wanted: Collection[str]) -> None:
        self._block = block
        self._attention, self._mlp = find_attention_and_mlp(block)
        self._name = name
        self._wanted = wanted
        self._inputs: list[Tensor] = []  # of the block's parts, once attention has run
        self.found: dict[str, Tensor] = {}

    def watch(self, hooks: ExitStack) -> None:
        """Keep the sites whenever the block runs, until the hooks are closed."""
        block = self._block
        for part in block.children():
            hooks.enter_context(part.register_forward_pre_hook(self._read))
        hooks.enter_context(block.register_forward_pre_hook(self._enter, with_kwargs=True))
        hooks.enter_context(self._attention.register_forward_hook(self._keep_attention))
        hooks.enter_context(self._mlp.register_forward_hook(self._keep_mlp))
        hooks.enter_context(block.register_forward_hook(self._leave))

    def _enter(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.found = {"resid_pre": args[0] if args else kwargs["hidden_states"]}

    def _read(self, _part: nn.Module, args: tuple[Any, ...]) -> None:
        if "attn_out" in self.found and args and isinstance(args[0], Tensor):
            self._inputs.append(args[0])

    def _keep_attention(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.found["attn_out"] = _tensor(output)

    def _keep_mlp(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.found["mlp_out"] = _tensor(output)

    def _leave(self, _block: nn.Module, _args: Any, output: Any) -> None:
        found, inputs, end = self.found, self._inputs, _tensor(output)
        self._inputs = []
        middle = found["resid_pre"] + found["attn_out"]
        tolerance = 16 * torch.finfo(end.dtype).eps * end.abs().max()

        def is_there(one: Tensor, other: Tensor) -> bool:
            return one.shape == other.shape and bool((one - other).abs().max() <= tolerance)

        if not is_there(middle + found["mlp_out"], end):
            raise InputError(
                f"{self._name} is not its input plus attention plus MLP, so it has no terms to "
                "read; ask for resid_pre and resid_post"
            )
        if "resid_mid" in self._wanted and not any(is_there(middle, one) for one in inputs):
            raise InputError(
                f"{self._name} runs attention and MLP side by side, so there is no resid_mid "
                "between them; ask for other sites"
            )
        found |= {"resid_mid": middle, "resid_post": end}
        self.found = {site: found[site] for site in self._wanted}


def find_attention_and_mlp(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """By name, as there is no other sign of them.

    Raises:
        InputError: there is not one of each.
    """
    found = []
    for names in (("attn", "attention"), ("mlp", "feed_forward", "ffn")):
        parts = [
            child
            for name, child in block.named_children()
            if any(part in name for part in names)
            and not any(part in name for part in ("norm", "ln", "dropout"))
        ]
        if len(parts) != 1:
            raise InputError(
                f"{type(block).__name__}: expected one {names[0]} in the block, found "
                f"{len(parts)}; sites within a block are not supported for this architecture"
            )
        found += parts
    return found[0], found[1]


def _tensor(output: Any) -> Tensor:
    """Attention, and a block of some architectures, returns a tuple."""
    return output[0] if isinstance(output, tuple) else output
