"""Finds blocks whose numbers are not finite, leaves them out, counts them and saves their tokens.

Each step checks one norm of its loss and gradient. The blocks of the step are checked one by one
only if the norm is not finite.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens import files
from tunedlens.engine import accumulate_gradient
from tunedlens.errors import InputError
from tunedlens.lenses import AffineLens
from tunedlens.progress import say
from tunedlens.training.run import Run, TrainState

FOLDER = "bad-blocks"
LOSS = "loss or its gradient"
MAX_BAD_BLOCKS = 16
"""More than these end the steps."""


class StepsEnded(Exception):  # noqa: N818 - the run continues with its table
    """The steps cannot continue. The message gives the reason; the lens so far can be used."""


def is_finite(kl: Float[Tensor, " points"], lens: AffineLens) -> bool:
    """Whether the losses and the gradient of a step are finite. Waits for the device."""
    gradients = [part.grad for part in lens.parameters() if part.grad is not None]
    return bool(torch.nn.utils.get_total_norm([kl, *gradients], torch.inf).isfinite())


def finite_blocks(
    final: Float[Tensor, "tokens d_model"], positions: int
) -> Bool[Tensor, " blocks"]:
    """Which blocks have finite states.

    If a state is not finite at one layer, the final state is not finite either.

    Args:
        positions: the number of tokens of a block in `final`.
    """
    return final.isfinite().view(-1, positions * final.shape[-1]).all(1)


def leave_out(
    run: Run, state: TrainState, input_ids: Int[Tensor, "batch seq"], active: Sequence[bool]
) -> Int[Tensor, "remaining seq"]:
    """The blocks of a step whose numbers are finite; the others are recorded. Clears the gradient.

    Raises:
        StepsEnded: all losses are bad though the states are not, or too many blocks are bad.
    """
    lens, places, step = state.optimizer.lens, _places(run), state.progress.step + 1
    lens.zero_grad()
    own_faults = [_first_fault(run, lens, row, active) for row in input_ids]
    # Each process knows the losses of its own layers; the first fault of any process counts.
    gathered = run.accelerator.gather(torch.tensor(own_faults, device=run.model.device))
    faults: list[int] = gathered.view(-1, len(input_ids)).amin(0).tolist()
    causes = [places[fault] if fault < len(places) else None for fault in faults]
    if all(cause is not None and LOSS in cause for cause in causes):
        raise StepsEnded(
            f"at step {step}, {causes[0]} is not finite for any block, so the steps are too "
            f"large; give a smaller --lr than {run.plan.lr:g}"
        )
    for index, (row, cause) in enumerate(zip(input_ids, causes, strict=True)):
        if cause is not None:
            state.progress.bad_blocks += 1
            if run.is_main:
                record(run.output, f"step-{step}-block-{index}", cause, row)
    if state.progress.bad_blocks > MAX_BAD_BLOCKS:
        raise StepsEnded(f"{state.progress.bad_blocks} blocks had numbers that are not finite")
    return input_ids[torch.tensor([cause is None for cause in causes])]


def record(output: Path, name: str, cause: str, row: Int[Tensor, " seq"]) -> None:
    """Print that a block is left out, and save its token ids in the run's folder."""
    path = output / FOLDER / f"{name}.json"
    say(f"{name.replace('-', ' ')} is left out: {cause} is not finite (its tokens: {path})")
    try:
        files.write_json(path, {"cause": f"{cause} is not finite", "input_ids": row.tolist()})
    except InputError as error:  # the run can continue without this file
        say(str(error))


def _first_fault(
    run: Run, lens: AffineLens, row: Int[Tensor, " seq"], active: Sequence[bool]
) -> int:
    """The index of the first of `_places` where a block is not finite; their number if none.

    The losses are those of the layers of this process.
    """
    # Every process reads the block, so each gets a copy of it.
    copies = row.expand(run.accelerator.num_processes, -1)
    (states,) = run.reader.read(copies)
    points, own = _by_layer(run), run.shards.own
    for place, index in enumerate([*points, len(points)]):
        if not states[index].isfinite().all():
            return place
    layers = [layer for layer, index in enumerate(own) if active[index]]
    own_states = [*(states[index] for index in own), states[-1]]
    kl = accumulate_gradient(lens, own_states, run.objective, layers=layers)
    gradients = [
        [part.grad for part in translator.parameters() if part.grad is not None]
        for translator in lens.all_translators()
    ]
    lens.zero_grad()
    numbers = {index: (kl[i], *gradients[i]) for i, index in enumerate(own)}
    for place, index in enumerate(points, len(points) + 1):
        if not all(part.isfinite().all() for part in numbers.get(index, ())):
            return place
    return 2 * len(points) + 1


def _places(run: Run) -> list[str]:
    """The places where a number may not be finite, in the order in which they are checked."""
    labels = [f"layer {run.reader.points[index].label}" for index in _by_layer(run)]
    states = [f"the state at {label}" for label in [*labels, "the end"]]
    return [*states, *(f"the {LOSS} at {label}" for label in labels)]


def _by_layer(run: Run) -> list[int]:
    """The indices of the points, from the first layer on."""
    points = run.reader.points
    return sorted(range(len(points)), key=lambda index: points[index].layer)
