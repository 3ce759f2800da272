"""The first pass over the text, which fits a lens without gradients of the KL."""

import threading
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens.distributed import reduce_sums
from tunedlens.errors import InputError
from tunedlens.fit import SKIPPED_POSITIONS, LeastSquares, MeanJacobian, PreconditionedMuon
from tunedlens.lenses import JacobianLens
from tunedlens.progress import progress_bar
from tunedlens.training.bad_blocks import FOLDER, MAX_BAD_BLOCKS, finite_blocks, record
from tunedlens.training.run import Progress, Run


def fit_closed_form(
    run: Run, optimizer: PreconditionedMuon, progress: Progress, stop: threading.Event
) -> None:
    """Initialise the optimizer from least squares over the first tokens of the text.

    The steps of a new run continue with the text that follows. A run that is extended, or that has
    `--init`, keeps its lens and takes only the preconditioner and the scale of the steps.

    Raises:
        InputError: the states of many blocks are not finite.
        KeyboardInterrupt: `stop` is set; there is nothing to save.
    """
    is_new, position, bad_blocks = progress.step == 0, progress.position, progress.bad_blocks
    d_model = run.model.identity.d_model
    sums, none = LeastSquares(len(run.shards.own), d_model), (run.reader.no_states,)
    for input_ids in _first_batches(run, progress, stop, "closed form"):
        local, rounds = _finite_states(run, progress, input_ids), run.reader.rounds(len(input_ids))
        for states, (final,) in run.shards.to_owners(local, rounds, none):
            sums.add(states, final)
    if not is_new:  # the blocks were counted when the run began
        progress.position, progress.bad_blocks = position, bad_blocks
    if not run.shards.is_divided:
        sums.reduce(run.accelerator)
    if run.plan.bias_only:
        solution = sums.mean_difference()
    else:
        solution = sums.solve(run.plan.ridge or sums.best_ridge(run.validation_set.least_squares()))
    optimizer.initialise(
        sums,
        solution,
        from_solution=is_new and run.plan.init is None,
        bias_only=run.plan.bias_only,
    )


def mean_jacobian(run: Run, progress: Progress, stop: threading.Event) -> JacobianLens:
    """The lens whose translators are the mean Jacobians over the first tokens of the text.

    Raises:
        KeyboardInterrupt: `stop` is set; there is nothing to save.
    """
    plan, identity = run.plan, run.model.identity
    jacobian = MeanJacobian(
        [point.layer for point in run.reader.points],
        identity.d_model,
        targets=plan.jacobian_targets,
        skipped=max(SKIPPED_POSITIONS, plan.skip_first),
        seed=plan.seed,
    )
    for input_ids in _first_batches(run, progress, stop, "jacobian"):
        for blocks in run.reader.micro_batches(input_ids):
            with run.reader.autocast():
                final = run.model.residual_stream(blocks)[-1]
                kept = blocks[_finite(run, progress, blocks, final.flatten(0, 1))]
                if len(kept):
                    jacobian.add(run.model, kept)
    jacobian.reduce(run.accelerator)
    return JacobianLens.from_jacobians(run.model, jacobian.mean.float(), jacobian.layers)


def _finite_states(
    run: Run, progress: Progress, input_ids: Int[Tensor, "batch seq"]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The states and the final states of this process's finite blocks, by micro-batch."""
    micro_batches = run.reader.micro_batches(input_ids)
    for blocks, states in zip(micro_batches, run.reader.read(input_ids), strict=True):
        kept = _finite(run, progress, blocks, states[-1])
        if not kept.all():
            tokens = kept.repeat_interleave(run.plan.positions)
            states = [state[tokens] for state in states]
        yield states[:-1], states[-1:]


def _finite(
    run: Run,
    progress: Progress,
    blocks: Int[Tensor, "blocks seq"],
    final: Float[Tensor, "tokens d_model"],
) -> Bool[Tensor, " blocks"]:
    """Which blocks have finite states; the others are recorded."""
    kept = finite_blocks(final, len(final) // len(blocks))
    for index in (~kept).nonzero().flatten().tolist():
        progress.bad_blocks += 1
        name = f"first-pass-{run.accelerator.process_index}-block-{progress.bad_blocks}"
        record(run.output, name, "the final state", blocks[index])
    return kept


def _first_batches(
    run: Run, progress: Progress, stop: threading.Event, description: str
) -> Iterator[Int[Tensor, "batch seq"]]:
    """The batches with the first `init_tokens` of the text; the progress counts them.

    Raises:
        InputError: the states of many blocks are not finite.
        KeyboardInterrupt: `stop` is set in any process.
    """
    plan, progress.init_tokens, earlier = run.plan, 0, progress.bad_blocks
    batches = run.batches()
    with progress_bar(plan.init_tokens, description, show=run.is_main) as bar:
        while progress.init_tokens < plan.init_tokens:
            batch, before = next(batches), progress.bad_blocks
            yield batch.input_ids
            progress.init_tokens += plan.step_tokens
            progress.position = batch.position
            bar.update(plan.step_tokens)
            found = torch.tensor([progress.bad_blocks - before, int(stop.is_set())])
            reduce_sums(run.accelerator, found)
            bad_blocks, is_stopping = found.tolist()
            progress.bad_blocks = before + bad_blocks
            if progress.bad_blocks - earlier > MAX_BAD_BLOCKS:
                raise InputError(
                    f"the final state of {run.model.identity.name} is not finite for "
                    f"{progress.bad_blocks - earlier} blocks of the first "
                    f"{progress.init_tokens:,} tokens; their tokens are in {run.output / FOLDER}; "
                    f"try another --dtype than {plan.model.dtype}"
                )
            if is_stopping and progress.init_tokens < plan.init_tokens:
                raise KeyboardInterrupt
