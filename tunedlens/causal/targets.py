"""Targets of an ablation: directions of a state, blocks, attention heads, MLP neurons."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.causal.stream import find_stream
from tunedlens.errors import InputError
from tunedlens.model import SITES, FrozenModel, HookPoint
from tunedlens.model.self_check import check_ids
from tunedlens.model.sites import (
    Args,
    Kwargs,
    input_state,
    output_state,
    replace_output_state,
)
from tunedlens.model.structure import find_attention_and_mlp, find_output_projection, mixer_name

Edit = Callable[[Float[Tensor, "batch seq values"]], Float[Tensor, "batch seq values"] | None]
"""A function that is called with the values of a target, and may return values to replace them."""
Hooks = AbstractContextManager[object]
Place = Callable[[Edit], Hooks]
"""Edits the values in every run of the model, until the hooks are closed."""
_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions of a state, whose coordinates are ablated.

    Args:
        basis: orthonormal rows, or one vector of any length.
        layer: the block, or n for the state that the final norm reads. A negative layer counts
            from n.
        site: one of `model.SITES`. `attn_out` and `mlp_out` are the outputs that attention and MLP
            add to the stream.
    """

    basis: Float[Tensor, "directions d_model"] | Float[Tensor, " d_model"]
    layer: int
    site: str = "resid_pre"

    def each(self) -> list["Directions"]:
        """Each direction as a separate target."""
        return [Directions(row[None], self.layer, self.site) for row in self.rows()]

    def rows(self) -> Float[Tensor, "directions d_model"]:
        """The orthonormal rows, in float32.

        Raises:
            InputError: they are not orthonormal.
        """
        basis = self.basis.detach().float()
        if basis.ndim == 1:
            basis = (basis / basis.norm())[None]
        gram, identity = basis @ basis.mT, torch.eye(len(basis), device=basis.device)
        if not (gram - identity).abs().max() <= _TOLERANCE:  # it may be NaN
            raise InputError(
                "expected directions of length 1 at right angles to each other, but the products "
                f"of the rows differ from those by up to {(gram - identity).abs().max():.2g}; "
                "torch.linalg.qr(basis.T).Q.T has the same span"
            )
        return basis

    def read_at(self, model: FrozenModel) -> HookPoint:
        """The state that is changed.

        Raises:
            InputError: there is no such site or layer.
        """
        if self.site not in SITES:
            raise InputError(f"site must be one of {', '.join(SITES)}; got {self.site!r}")
        count = len(model.blocks) + (self.site == "resid_pre")
        return HookPoint(self.site, _index("layer", self.layer, count, model.name))

    def find(self, model: FrozenModel) -> Place:
        """Find the coordinates in a model.

        Raises:
            InputError: there is no such state, or its width differs from that of the directions.
        """
        rows, width = self.rows(), model.identity.d_model
        if rows.shape[1] != width:
            raise InputError(
                f"the states of {model.name} have {width} dimensions, got directions of "
                f"{rows.shape[1]}"
            )

        stream = find_stream(model, self.read_at(model))

        def attach(edit: Edit) -> Hooks:
            def see(hidden: Tensor) -> Tensor | None:
                basis = rows.to(hidden.device)
                coordinates = hidden.float() @ basis.mT
                edited = edit(coordinates)
                if edited is None:
                    return None
                return (hidden + (edited - coordinates) @ basis).to(hidden.dtype)

            return stream(see)

        return attach


@dataclass(frozen=True)
class Block:
    """A whole block, whose addition to the residual stream is ablated."""

    layer: int

    def read_at(self, model: FrozenModel) -> HookPoint:
        """The first state between blocks that is changed."""
        return _after_block(model, self.layer)

    def find(self, model: FrozenModel) -> Place:
        """Find the block in a model."""
        return partial(_on_addition, model.blocks[_block_index(model, self.layer)])


@dataclass(frozen=True)
class Head:
    """An attention head, whose part of the input to attention's output projection is ablated."""

    layer: int
    head: int

    def read_at(self, model: FrozenModel) -> HookPoint:
        """The first state between blocks that is changed."""
        return _after_block(model, self.layer)

    def find(self, model: FrozenModel) -> Place:
        """Find the head in a model.

        Raises:
            InputError: there is no such head, or the heads of this architecture are not found.
        """
        layer = _block_index(model, self.layer)
        block = model.blocks[layer]
        attention = block.get_submodule(mixer_name(block))
        config = model.model.config.get_text_config()
        count = getattr(config, "num_attention_heads", None)
        projection = find_output_projection(attention, model.identity.d_model)
        is_attention = "attention" in type(attention).__name__.lower()
        width = 0 if projection is None else projection.weight.numel() // model.identity.d_model
        if not is_attention or projection is None or not count or width % count:
            raise InputError(
                f"the heads of block {layer} of {model.name} ({type(attention).__name__}) are not "
                "found; heads are not supported for this architecture"
            )
        size = width // count
        first = size * _index("head", self.head, count, model.name)
        return partial(_on_input_columns, projection, slice(first, first + size))


@dataclass(frozen=True)
class Neuron:
    """A neuron of an MLP, whose coefficient (as in `model.mlp_neurons`) is ablated."""

    layer: int
    neuron: int

    def read_at(self, model: FrozenModel) -> HookPoint:
        """The first state between blocks that is changed."""
        return _after_block(model, self.layer)

    def find(self, model: FrozenModel) -> Place:
        """Find the coefficient in a model.

        Raises:
            InputError: there is no such neuron, or the MLP is not a sum over neurons.
        """
        layer = _block_index(model, self.layer)
        ids = check_ids(model.identity.vocab_size, model.context)
        _, vectors = model.mlp_neurons(ids, layer)
        _, mlp = find_attention_and_mlp(model.blocks[layer])
        projection = find_output_projection(mlp, model.identity.d_model)
        assert projection is not None, "`mlp_neurons` requires one"
        neuron = _index("neuron", self.neuron, len(vectors), model.name)
        return partial(_on_input_columns, projection, slice(neuron, neuron + 1))


Target = Directions | Block | Head | Neuron


def _on_addition(block: nn.Module, edit: Edit) -> Hooks:
    """Edit what a block adds to the stream."""
    start: list[Tensor] = []

    def enter(_block: nn.Module, args: Args, kwargs: Kwargs) -> None:
        start[:] = [input_state(args, kwargs).clone()]  # some blocks add in place

    def leave(_block: nn.Module, _args: Args, output: object) -> object:
        end = output_state(output)
        before = start.pop().to(end.device)
        edited = edit(end - before)
        return None if edited is None else replace_output_state(output, before + edited)

    hooks = ExitStack()
    hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
    hooks.enter_context(block.register_forward_hook(leave))
    return hooks


def _on_input_columns(module: nn.Module, columns: slice, edit: Edit) -> Hooks:
    """Edit some columns of what a module reads."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        values = args[0][..., columns]
        edited = edit(values)
        if edited is None:
            return None
        changed = args[0].clone()
        changed[..., columns] = edited
        return (changed, *args[1:])

    return module.register_forward_pre_hook(hook)


def _after_block(model: FrozenModel, layer: int) -> HookPoint:
    return HookPoint("resid_pre", _block_index(model, layer) + 1)


def _block_index(model: FrozenModel, layer: int) -> int:
    return _index("layer", layer, len(model.blocks), model.name)


def _index(what: str, index: int, count: int, name: str) -> int:
    """An index from 0, where a negative one counts from the end."""
    if not -count <= index < count:
        raise InputError(
            f"{what} must be between 0 and {count - 1} (or {-count} and -1, from the end) for "
            f"{name}, got {index}"
        )
    return index % count
