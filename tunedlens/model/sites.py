"""Captures the residual stream and its terms inside every block, with forward hooks."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tunedlens.errors import InputError
from tunedlens.model.structure import is_norm, mixer_name

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""The sites of a block, in the order in which it computes them: the stream that enters the block,
the output of attention, the stream between attention and MLP, the output of the MLP, and the stream
that leaves the block."""

TRANSLATED_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out")
"""The sites of translators, without `resid_post`, which is `resid_pre` of the next block."""


class HookPoint(NamedTuple):
    """A site in one block."""

    site: str
    """One of `SITES`."""
    layer: int
    """The block; `resid_pre` also has layer n, the state that the final norm reads."""

    @property
    def label(self) -> str:
        """The layer, with the site if that is not the stream between blocks."""
        return str(self.layer) if self.site == "resid_pre" else f"{self.layer} {self.site}"


def hook_points(sites: Iterable[str], layers: Sequence[int]) -> tuple[HookPoint, ...]:
    """The points of some layers, by site and then by layer."""
    return tuple(HookPoint(site, layer) for site in sites for layer in layers)


Args = tuple[object, ...]
Kwargs = dict[str, object]


def input_state(args: Args, kwargs: Kwargs) -> Tensor:
    """The hidden states that a block is called with, by position or by name."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def output_state(output: object) -> Tensor:
    """The hidden states that a block returns, which some blocks wrap in a tuple."""
    output = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(output, Tensor)
    return output


def replace_input_state(args: Args, kwargs: Kwargs, hidden: Tensor) -> tuple[Args, Kwargs]:
    """The arguments of a block with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def replace_output_state(output: object, hidden: Tensor) -> object:
    """The output of a block with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden


class _Call(NamedTuple):
    """One call of a part of a block."""

    name: str
    inputs: list[Tensor]
    """The inputs that have the shape of the stream."""
    output: Tensor
    is_norm: bool


class _Terms(NamedTuple):
    """The terms that a block adds to the residual stream."""

    attn_out: Tensor
    mlp_out: Tensor
    middle: Tensor | None
    """The stream between the two, or None if attention and MLP run side by side."""


class BlockSites:
    """The sites of one block, which are captured while it runs and checked afterwards.

    The terms that the block adds to the stream are found among the outputs of its parts. In most
    models, they are the outputs of attention and MLP. In others, a term is the output of a norm
    after them (Gemma 2, OLMo 2), is multiplied by a constant (Granite), or is the output of a part
    minus the stream, because the part itself adds the stream (BLOOM).

    Args:
        name: the name of the block in messages.
        wanted: the names from `SITES` to keep.
    """

    def __init__(self, block: nn.Module, name: str, wanted: Collection[str]) -> None:
        self._block = block
        self._mixer = mixer_name(block)
        self._name = name
        self._wanted = wanted
        self._start: Tensor | None = None
        self._calls: list[_Call] = []
        self.captured: dict[str, Tensor] = {}

    def register(self, hooks: ExitStack) -> None:
        """Capture the sites whenever the block runs, until the hooks are closed."""
        hooks.enter_context(self._block.register_forward_pre_hook(self._enter, with_kwargs=True))
        for name, part in self._block.named_children():
            if isinstance(part, nn.Dropout):
                continue  # its output is its input, which need not be the stream
            hooks.enter_context(part.register_forward_hook(self._keep_as(name), with_kwargs=True))
        hooks.enter_context(self._block.register_forward_hook(self._leave))

    def _enter(self, _block: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self._start, self._calls = input_state(args, kwargs), []

    def _keep_as(self, name: str) -> Callable[[nn.Module, Args, Kwargs, object], None]:
        def keep(part: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
            read = [self._state(value) for value in (*args, *kwargs.values())]
            written = self._state(output)
            if written is not None:
                inputs = [value for value in read if value is not None]
                self._calls.append(_Call(name, inputs, written, is_norm(part)))

        return keep

    def _state(self, value: object) -> Tensor | None:
        """A copy of a value that has the shape of the stream, which some blocks flatten."""
        value = value[0] if isinstance(value, (tuple, list)) else value
        if self._start is None or not isinstance(value, Tensor):
            return None
        fits = value.numel() == self._start.numel() and value.is_floating_point()
        return value.reshape(self._start.shape).clone() if fits else None  # some add in place

    def _leave(self, _block: nn.Module, _args: Args, output: object) -> None:
        assert self._start is not None
        end, calls = output_state(output), self._calls
        start = self._start.to(end.device)  # the block before may be on another one
        self._start, self._calls = None, []
        names = [call.name for call in calls]
        terms = None
        if self._mixer in names:
            index = names.index(self._mixer)
            terms = _sequential(start, end, calls[index:]) or _parallel(
                start, end, calls[index:] + calls[:index]
            )
        if terms is None:
            raise InputError(
                f"the output of {self._name} is not its input plus attention plus MLP, so only "
                "resid_pre and resid_post can be read; leave out other sites"
            )
        if "resid_mid" in self._wanted and terms.middle is None:
            raise InputError(
                f"{self._name} runs attention and MLP side by side, so there is no resid_mid; "
                "leave out this site"
            )
        sites = {"resid_pre": start, "resid_mid": terms.middle, "resid_post": end}
        sites |= {"attn_out": terms.attn_out, "mlp_out": terms.mlp_out}
        self.captured = {site: found for site in self._wanted if (found := sites[site]) is not None}


def _sequential(start: Tensor, end: Tensor, calls: list[_Call]) -> _Terms | None:
    """The terms if some part after attention reads the stream between the two."""
    for index in range(1, len(calls)):
        if not calls[index].inputs:
            continue
        middle = calls[index].inputs[0]
        attn_out = next(_additions(start, middle, calls[:index]), None)
        mlp_out = next(_additions(middle, end, calls[index:]), None)
        if attn_out is not None and mlp_out is not None:
            return _Terms(attn_out, mlp_out, middle)
    return None


def _parallel(start: Tensor, end: Tensor, calls: list[_Call]) -> _Terms | None:
    """The terms if attention and MLP both read the start. The first call is attention."""
    attn_out, middle = calls[0].output, start + calls[0].output
    mlp_out = next(_additions(middle, end, calls[1:]), None)
    return None if mlp_out is None else _Terms(attn_out, mlp_out, None)


def _additions(before: Tensor, after: Tensor, calls: list[_Call]) -> Iterator[Tensor]:
    """The outputs that, perhaps times a constant, are the difference of the streams."""
    step = after - before
    for call in reversed(calls):
        adds_stream = any(_agree(value, before) for value in call.inputs) and not call.is_norm
        if adds_stream and _agree(call.output, after):
            yield step
        if _agree(before + call.output, after):
            yield call.output
        if _agree(before, after):
            continue  # nothing was added, and a factor of 0 would fit everything
        factor = float((step.float() * call.output.float()).sum() / call.output.float().norm() ** 2)
        if _agree(before + factor * call.output, after):
            yield factor * call.output


def _agree(one: Tensor, other: Tensor) -> bool:
    tolerance = 16 * torch.finfo(other.dtype).eps * other.abs().max()
    return bool((one - other).abs().max() <= tolerance)
