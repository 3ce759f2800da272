"""Ablation in the model's run: values are replaced by zero, their mean, or other positions'."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.causal.targets import Edit, Place, Target
from tunedlens.errors import InputError
from tunedlens.model import FrozenModel

Mode = Literal["mean", "zero", "resample"]


@contextmanager
def ablated(
    model: FrozenModel,
    targets: Target | Sequence[Target],
    mode: Mode = "mean",
    *,
    reference: Int[Tensor, "batch seq"] | None = None,
    seed: int = 0,
    skip_first: int = 0,
) -> Iterator[FrozenModel]:
    """Ablate values of a model in every run inside the `with` block.

    All uses of the model are affected: its states and logits, trajectories, evaluations and
    generation.

    Args:
        targets: `Directions`, `Block`, `Head` or `Neuron`, or a list of them.
        mode: replaces the values by their `mean` over the positions, by `zero`, or by those at
            another position, drawn at random (`resample`). All values of a target are drawn from
            the same position.
        reference: token ids of a text over whose positions means are taken, and from which values
            are drawn. By default these are the positions of all sequences of the run itself. A
            run that continues with a key-value cache has only its new positions.
        seed: the seed for drawing values.
        skip_first: this number of positions at the start of every sequence is not changed, and is
            left out of means and draws. In many models, the state at the first position is far
            from all others and would change the mean.

    Raises:
        InputError: the model has no such target, there is no such mode, or a run has too few
            positions for means or draws.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 4 (mean, resample).
    """
    require_mode(mode)
    if skip_first < 0:
        raise InputError(f"skip_first must be 0 or more, got {skip_first}")
    targets = [targets] if not isinstance(targets, Sequence) else targets
    places = [target.find(model) for target in targets]  # some run the model, so before any hook
    pools: list[Tensor | None] = [None] * len(places)
    if reference is not None and mode != "zero":
        pools = list(_read(model, places, reference, skip_first))
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as hooks:
        for place, pool in zip(places, pools, strict=True):
            hooks.enter_context(place(_Ablation(mode, pool, generator, skip_first)))
        yield model


def require_mode(mode: str) -> None:
    """Check the mode of an ablation.

    Raises:
        InputError: there is no such mode.
    """
    if mode not in get_args(Mode):
        raise InputError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}")


def replacements(
    values: Float[Tensor, "positions values"],
    pool: Float[Tensor, "others values"] | None,
    mode: Mode,
    generator: torch.Generator,
) -> Float[Tensor, "positions values"]:
    """The values that replace the given ones.

    Args:
        pool: values for means and draws; by default the given values themselves, each of which is
            then moved to another position.

    Raises:
        InputError: there are no other values.
    """
    if mode == "zero":
        return torch.zeros_like(values)
    if len(values if pool is None else pool) < (2 if pool is None else 1):
        raise InputError(
            f"{mode} ablation uses values of other positions, but the run has only {len(values)} "
            "after skip_first; give a longer text, or token ids as reference"
        )
    if mode == "mean":
        others = values if pool is None else pool
        mean = others.mean(0, dtype=torch.promote_types(others.dtype, torch.float32))
        return mean.to(values.dtype).expand_as(values)
    if pool is None:
        # A random cycle through all positions, so that no position keeps its own value.
        order = torch.randperm(len(values), generator=generator)
        drawn = torch.empty_like(order)
        drawn[order] = order.roll(1)
        return values[drawn.to(values.device)]
    drawn = torch.randint(len(pool), (len(values),), generator=generator)
    return pool[drawn.to(pool.device)].to(values)


class _Ablation:
    """The edit of one target."""

    def __init__(
        self, mode: Mode, pool: Tensor | None, generator: torch.Generator, skip_first: int
    ) -> None:
        self._mode, self._pool, self._skip = mode, pool, skip_first
        self._generator = generator

    def __call__(
        self, values: Float[Tensor, "batch seq values"]
    ) -> Float[Tensor, "batch seq values"]:
        counted = _counted(values, self._skip)
        pool = None if self._pool is None else self._pool.to(values.device)
        changed = replacements(counted.flatten(0, -2), pool, self._mode, self._generator)
        return torch.cat([values[:, : self._skip], changed.view_as(counted)], 1)


def _counted(values: Tensor, skip_first: int) -> Tensor:
    """The values at the positions that count."""
    if not skip_first:
        return values
    if values.ndim != 3:
        raise InputError(
            "this architecture flattens all sequences before the target, so the first positions "
            "of each sequence are not known; leave skip_first out"
        )
    return values[:, skip_first:]


def _read(
    model: FrozenModel,
    places: Sequence[Place],
    reference: Int[Tensor, "batch seq"],
    skip_first: int,
) -> list[Float[Tensor, "positions values"]]:
    """The values of every target in a run without ablation."""
    found: dict[int, Tensor] = {}

    def keep_as(index: int) -> Edit:
        def keep(values: Tensor) -> None:
            found[index] = _counted(values, skip_first).flatten(0, -2).clone()

        return keep

    with ExitStack() as hooks:
        for index, place in enumerate(places):
            hooks.enter_context(place(keep_as(index)))
        model.residual_stream(reference)
    return [found[index] for index in range(len(places))]
