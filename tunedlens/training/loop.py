"""The training loop: makes the plan and the initial state, takes steps, validates and saves."""

import dataclasses
import math
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens import checkpoint
from tunedlens.config import TrainConfig, WandbMode
from tunedlens.corpus import SELF, TextRanOutError
from tunedlens.devices import float32_products
from tunedlens.distributed import join_processes, reduce_sums
from tunedlens.doctor import warn_of_faults
from tunedlens.engine import accumulate_gradient
from tunedlens.engine.objective import ModelSide
from tunedlens.engine.vocab_sample import draw_sample
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation
from tunedlens.fit import PreconditionedMuon, ValidationResult, converged_layers
from tunedlens.lenses import AffineLens
from tunedlens.model import FrozenModel, load_configured
from tunedlens.progress import progress_bar
from tunedlens.tracking import Tracker
from tunedlens.training import checkpointing, messages
from tunedlens.training.bad_blocks import StepsEnded, is_finite, leave_out
from tunedlens.training.checkpointing import finish
from tunedlens.training.first_pass import fit_closed_form, mean_jacobian
from tunedlens.training.lock import locked
from tunedlens.training.plan import next_validation_step
from tunedlens.training.resolving import resolve
from tunedlens.training.run import Run, TrainState, initial_state
from tunedlens.training.state_cache import CacheSettings
from tunedlens.training.stopping import Interrupted, stop_flag

_STEPS_PER_METRIC = 16
"""Reading a metric waits for the device, so it is not done at every step."""
_SECONDS_PER_SAVE = 300


@float32_products()
def train(
    config: TrainConfig,
    output: str | Path | None = None,
    *,
    model: FrozenModel | None = None,
    resume: bool = False,
    wandb: WandbMode = "disabled",
    cache: CacheSettings | None = None,
) -> Evaluation:
    """See `calls.train`. A loaded model must be the one that the config names."""
    if resume and output is None:
        raise InputError("resume needs the folder of the run; give output")
    accelerator = join_processes(config.model.device)
    output = checkpointing.new_folder(config) if output is None else Path(output)
    with locked(output, is_main=accelerator.is_main_process):
        checkpointing.require_usable(output, resume=resume)
        model = model or load_configured(config.model, accelerator.device)
        if resume:
            config = checkpointing.continued(config, output)
        is_sampled = config.corpus.dataset == SELF
        warn_of_faults(model, is_bos_default=config.corpus.bos is None, is_sampled=is_sampled)
        plan = resolve(config, model, accelerator)
        run = Run(plan, output, model, accelerator, cache)
        state = checkpointing.restore(run) if resume else initial_state(run)
        messages.describe(run)
        mode = wandb if run.is_main else "disabled"
        with Tracker(mode, output.name, dataclasses.asdict(plan), output) as tracker:
            lens = _fit(run, state, tracker)
            try:
                return finish(run, state, tracker, lens)
            except KeyboardInterrupt:
                if not checkpoint.has_state(output):
                    raise
                raise Interrupted("stopped before the table at the end") from None


def _fit(run: Run, state: TrainState, tracker: Tracker) -> AffineLens:
    """Fit the lens of the run. When the run is asked to stop, it saves its state."""
    with stop_flag(show=run.is_main) as stop:
        if run.plan.fit == "jacobian":
            return mean_jacobian(run, state.progress, stop)
        is_interrupted = checkpoint.has_state(run.output)
        if isinstance(state.optimizer, PreconditionedMuon) and not is_interrupted:
            fit_closed_form(run, state.optimizer, state.progress, stop)
        if run.plan.fit != "closed-form":
            try:
                _take_steps(run, state, tracker, stop)
            except StepsEnded as reason:
                _end_early(run, state, tracker, str(reason))
        return run.whole_lens(state.best_lens(run.shards.own))


def _end_early(run: Run, state: TrainState, tracker: Tracker, reason: str) -> None:
    """Revert the layers that the steps have made worse to the closed form.

    Raises:
        InputError: the fit did not start from a closed form.
    """
    if not isinstance(state.optimizer, PreconditionedMuon):
        raise InputError(reason)
    run.say(f"{reason}: the run ends with the last good lens")
    state.progress.ended_early = reason
    kl_nats, _ = run.validation_set.kl(state.optimizer.result(), run.objective)
    for layer, index in enumerate(run.shards.own):
        if not kl_nats[index] <= state.progress.history[0].kl_nats[index]:  # or is not a number
            state.optimizer.revert(layer)
    _validate(run, state, tracker)


def _take_steps(run: Run, state: TrainState, tracker: Tracker, stop: threading.Event) -> None:
    """Take all steps from the current state on, validating and saving in between."""
    plan, progress = run.plan, state.progress
    history, time_left, saved = progress.history, messages.TimeLeft(run), time.monotonic()
    if not history:
        _validate(run, state, tracker)
    batches = run.batches(progress.position)
    with progress_bar(plan.budget, plan.fit, progress.tokens, run.is_main) as bar:
        while progress.tokens < plan.budget:
            active = [plan.tokens is not None or not done for done in converged_layers(history)]
            if not any(active):
                break
            try:
                batch = next(batches)
            except InputError as error:
                # Without a fixed number of tokens, a run may end where its text ends.
                if plan.tokens is not None or not isinstance(error, TextRanOutError):
                    checkpointing.save(run, state)
                    raise
                run.say(f"{str(error).split(';')[0]}: the run ends here")
                break
            kl = _accumulate(run, state, batch.input_ids, active)
            is_due = time.monotonic() - saved > _SECONDS_PER_SAVE
            is_stopping, is_due = _reduce(run, state, kl, stop.is_set(), is_due)
            if not is_finite(kl, state.optimizer.lens):
                kl = _accumulate_finite(run, state, batch.input_ids, active)
            state.optimizer.step([active[i] for i in run.shards.own], progress.tokens / plan.budget)
            progress.step += 1
            progress.tokens += plan.step_tokens
            progress.position = batch.position

            bar.update(plan.step_tokens)
            time_left.after_step(progress, kl)
            if progress.step % _STEPS_PER_METRIC == 0:
                bar.set_postfix_str(f"held-out KL {history[-1].mean_kl_nats:.3f} nats")
                if not plan.vocab_sample:  # the KL of a sample is only an estimate
                    mean = kl.sum().item() / sum(active)
                    tracker.log({"train/kl_nats": mean}, progress.step)
            if progress.step >= next_validation_step([result.step for result in history]):
                _validate(run, state, tracker)
            if is_stopping and progress.tokens < plan.budget:
                checkpointing.save(run, state)
                tokens = progress.init_tokens + progress.tokens  # as in the lines of progress
                raise Interrupted(f"stopped after {tokens:,} tokens")
            if is_due:
                checkpointing.save_if_possible(run, state)
                saved = time.monotonic()
    if history[-1].step < progress.step:
        _validate(run, state, tracker)
    checkpointing.save_if_possible(run, state)


def _accumulate(
    run: Run, state: TrainState, input_ids: Int[Tensor, "batch seq"], active: list[bool]
) -> Float[Tensor, " layers"]:
    """Add up the gradient over this process's blocks; return their part of the mean KL."""
    plan, objective, device = run.plan, run.objective, run.model.device
    own = run.shards.own
    layers = [layer for layer, index in enumerate(own) if active[index]]
    kl, keys = torch.zeros(len(own), device=device), objective.keys()
    usage = torch.zeros(run.model.identity.vocab_size, device=device) if plan.vocab_sample else None
    micro_batches: Iterable[tuple[list[Tensor], Sequence[Tensor]]] = (
        (states[:-1], objective.model_side(states[-1], usage))
        for states in run.reader.read(input_ids, is_held=usage is not None)
    )
    if usage is not None:
        # The sample depends on all tokens of the step, and so not on how they are divided into
        # micro-batches and processes. The states are held until it is drawn.
        held = list(micro_batches)
        reduce_sums(run.accelerator, usage)
        keys = objective.keys(draw_sample(usage, plan.vocab_sample, plan.seed, state.progress.step))
        # Each micro-batch is freed once its gradient is computed.
        micro_batches = (held.pop(0) for _ in range(len(held)))
    rounds = run.reader.rounds(len(input_ids))
    none = ModelSide.of_no_tokens(run.model.identity.d_model, device)
    for states, shared in run.shards.to_owners(micro_batches, rounds, none):
        model_side = ModelSide(*shared)
        kl += accumulate_gradient(
            state.optimizer.lens,
            [*states, model_side.mean_row],
            objective,
            model=model_side,
            keys=keys,
            layers=layers,
            fraction=len(model_side.offset) / plan.step_tokens,
        )
    for translator in (state.optimizer.lens.all_translators()[layer] for layer in layers):
        for parameter in translator.parameters():
            if parameter.grad is None:  # this process has no block of the step
                parameter.grad = torch.zeros_like(parameter)
    return run.shards.expand(kl)


def _accumulate_finite(
    run: Run, state: TrainState, input_ids: Int[Tensor, "batch seq"], active: list[bool]
) -> Float[Tensor, " layers"]:
    """As `_accumulate`, without the blocks with non-finite numbers, summed over processes."""
    kept = leave_out(run, state, input_ids, active)
    if not len(kept):
        return torch.zeros(len(active), device=run.model.device)
    kl = _accumulate(run, state, kept, active)
    _reduce(run, state, kl)
    if not is_finite(kl, state.optimizer.lens):
        raise StepsEnded(f"the gradient of step {state.progress.step + 1} is not finite")
    return kl


def _reduce(
    run: Run, state: TrainState, kl: Float[Tensor, " layers"], *flags: bool
) -> tuple[bool, ...]:
    """Add up the gradients and the KL of all processes; return which flags any of them has set."""
    if run.accelerator.num_processes == 1:
        return flags
    lens = state.optimizer.lens
    gradients = [part.grad for part in lens.parameters() if part.grad is not None]
    if run.shards.is_divided:  # only whether the gradients are finite is shared
        gradients = []
        if not is_finite(kl, lens):
            kl.fill_(math.nan)
    parts = [*gradients, kl, kl.new_tensor([float(flag) for flag in flags])]
    total = run.accelerator.reduce(torch.cat([part.flatten() for part in parts]), "sum")
    for part, value in zip(parts, total.split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view_as(part))
    return tuple(flag > 0 for flag in parts[-1].tolist())


def _validate(run: Run, state: TrainState, tracker: Tracker) -> None:
    """Add the held-out KL of every layer to the history, print it and log it."""
    progress = state.progress
    kl_nats, standard_error = run.validation_set.kl(state.optimizer.result(), run.objective)
    seconds = progress.update_seconds()
    result = ValidationResult(progress.step, progress.tokens, seconds, kl_nats, standard_error)
    if not math.isfinite(result.mean_kl_nats):
        problem = f"held-out KL is {result.mean_kl_nats} after {result.tokens:,} tokens"
        if not progress.history:
            raise InputError(f"{problem}, so the fit has no valid starting point")
        raise StepsEnded(
            f"{problem}, so the steps are too large; give a smaller --lr than {run.plan.lr:g}"
        )
    progress.history.append(result)
    messages.say_validation(run, progress)
    by_layer = {
        f"held_out/kl_nats/{point.label}": value
        for point, value in zip(run.reader.points, kl_nats, strict=True)
    }
    tracker.log(by_layer, result.step)
