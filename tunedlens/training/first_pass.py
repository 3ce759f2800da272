"""The first pass over the text, which makes a lens without any gradient of the KL."""

import threading
from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor

from tunedlens.fit import SKIPPED_POSITIONS, LeastSquares, MeanJacobian, PreconditionedMuon
from tunedlens.lenses import JacobianLens
from tunedlens.tracking import progress_bar
from tunedlens.training.run import Progress, Run


def fit_closed_form(run: Run, optimizer: PreconditionedMuon, progress: Progress) -> None:
    """Initialise the optimizer from least squares over the first tokens of the text.

    The steps of a new run continue with the text that follows. A run that is extended keeps its
    lens, as one with `--init` does, and takes only the preconditioner and the scale of the steps.
    """
    is_new, position = progress.step == 0, progress.position
    sums = LeastSquares(len(run.reader.points), run.model.identity.d_model)
    for input_ids in _first_batches(run, progress, "closed form"):
        for states in run.reader.read(input_ids):
            sums.add(states[:-1], states[-1])
    if not is_new:
        progress.position = position
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
    for input_ids in _first_batches(run, progress, "jacobian"):
        if stop.is_set():
            raise KeyboardInterrupt
        for blocks in run.reader.micro_batches(input_ids):
            with run.reader.autocast():
                jacobian.add(run.model, blocks)
    jacobian.reduce(run.accelerator)
    return JacobianLens.from_jacobians(run.model, jacobian.mean.float(), jacobian.layers)


def _first_batches(
    run: Run, progress: Progress, description: str
) -> Iterator[Int[Tensor, "batch seq"]]:
    """The batches with the first `init_tokens` of the text; the progress counts them."""
    plan, progress.init_tokens = run.plan, 0
    batches = run.splits.train.batches(plan.batch_size, plan.seed)
    with progress_bar(plan.init_tokens, description, show=run.is_main) as bar:
        while progress.init_tokens < plan.init_tokens:
            batch = next(batches)
            yield batch.input_ids
            progress.init_tokens += plan.step_tokens
            progress.position = batch.position
            bar.update(plan.step_tokens)
