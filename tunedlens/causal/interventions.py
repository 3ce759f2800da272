"""States with and without an ablation, at the place that a lens reads and at the end."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.causal.ablation import Mode, ablated
from tunedlens.causal.targets import Directions, Target
from tunedlens.errors import InputError
from tunedlens.evaluation import Estimate, RatioSums
from tunedlens.model import FrozenModel, HookPoint

States = Float[Tensor, "batch seq d_model"]


class Intervention(NamedTuple):
    """One ablation, at the positions that count."""

    target: Target
    point: HookPoint
    """The first state that is changed."""
    before: States
    after: States
    final_before: States
    """The state that the final norm reads."""
    final_after: States


def interventions(
    model: FrozenModel,
    input_ids: Int[Tensor, "batch seq"],
    targets: Directions | Sequence[Target],
    mode: Mode,
    *,
    seed: int,
    skip_first: int,
) -> Iterator[Intervention]:
    """Run the model once without ablation, and once with each target ablated.

    Raises:
        InputError: no position counts, or as `ablated`.
    """
    targets = targets.each() if isinstance(targets, Directions) else list(targets)
    require_some_count(input_ids, skip_first)
    points = [target.read_at(model) for target in targets]
    final = HookPoint("resid_pre", len(model.blocks))
    distinct = list(dict.fromkeys([*points, final]))
    states = model.states_at(distinct, input_ids)
    clean = {p: state[:, skip_first:] for p, state in zip(distinct, states, strict=True)}
    for target, point in zip(targets, points, strict=True):
        with ablated(model, target, mode, seed=seed, skip_first=skip_first):
            after = model.states_at([point, final], input_ids)
        changed, last = (state[:, skip_first:] for state in after)
        yield Intervention(target, point, clean[point], changed, clean[final], last)


def require_some_count(input_ids: Int[Tensor, "batch seq"], skip_first: int) -> None:
    """Check that positions are left after the first ones.

    Raises:
        InputError: there are none.
    """
    longest = input_ids.shape[1] - 1
    if not 0 <= skip_first <= longest:
        raise InputError(
            f"skip_first must be between 0 and {longest} for sequences of {longest + 1} tokens, "
            f"got {skip_first}"
        )


def mean_over_positions(values: Float[Tensor, "batch seq"]) -> Estimate:
    """The mean, with its standard error clustered by sequence."""
    sums = RatioSums()
    counts = torch.full((len(values),), float(values.shape[1]))
    sums.add(values.cpu().double().sum(1)[None], counts)
    return sums.estimates().at(0)
