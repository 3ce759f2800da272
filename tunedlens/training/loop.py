"""The loop: reads top to bottom."""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens import checkpoint, files
from tunedlens.checkpoint import saved_config
from tunedlens.config import TrainConfig, WandbMode
from tunedlens.corpus import TextRanOutError, load_splits, resolve_corpus
from tunedlens.distributed import reduce_sums
from tunedlens.engine import accumulate_gradient
from tunedlens.engine.objective import Keys, ModelSide
from tunedlens.engine.vocab_sample import draw_sample
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation
from tunedlens.fit import (
    SKIPPED_POSITIONS,
    LeastSquares,
    MeanJacobian,
    Preconditioned,
)
from tunedlens.lenses import JacobianLens
from tunedlens.model import load_configured
from tunedlens.tracking import Tracker, progress_bar, say
from tunedlens.training.costs import count_looks, next_look
from tunedlens.training.plan import budget, settled
from tunedlens.training.run import Run

_STEPS_PER_FIGURE = 16
"""LensPredictions a figure waits for the device, so it is not done at every step."""
_STEPS_BEFORE_ESTIMATE = 4
"""The time that a run takes is said after so many, without the first one, which is slower."""
_SECONDS_PER_SAVE = 300


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop; it is saved and can go on."""


def train(
    config: TrainConfig, output: Path, *, resume: bool = False, wandb: WandbMode = "disabled"
) -> Evaluation:
    """Train a tuned lens and save it in `output`.

    A run is a function of its config: interrupted and resumed, it takes the steps that it
    would have taken, bit for bit on the same device.

    Args:
        config: everything that the numbers depend on.
        output: the run's folder.
        resume: go on with the interrupted run in `output`, or extend the finished one
            there to the greater `config.tokens`.
        wandb: whether Weights & Biases is told the figures.

    Returns:
        Held-out figures of the logit lens and the tuned lens.

    Raises:
        InputError: something that was asked for cannot be had.
        Interrupted: after Ctrl-C or SIGTERM; what was done is saved.
        KeyboardInterrupt: the same, in a fit that takes no steps: there is nothing to save.
    """
    _require_usable(output, resume)
    accelerator = Accelerator()
    model = load_configured(config.model, accelerator.device)
    if resume:
        config = _filled(config, saved_config(output))
    config = settled(config, model, accelerator)
    run = Run(
        config,
        output,
        model,
        load_splits(resolve_corpus(config.corpus, model.name, model.context), model.tokenizer),
        accelerator,
    )
    if resume:
        run.restore()
    run.describe()

    mode = wandb if accelerator.is_main_process else "disabled"
    with (
        Tracker(mode, output.name, dataclasses.asdict(config), output) as tracker,
        _stop_flag() as stop,
    ):
        if config.fit == "jacobian":
            return run.finish(tracker, _mean_jacobian(run, stop))
        if isinstance(run.steps, Preconditioned) and not (output / checkpoint.STATE).exists():
            _first_pass(run, run.steps)
        if config.fit != "closed-form":
            _take_steps(run, tracker, stop)
        return run.finish(tracker)


def _filled(config: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """The config of a resumed run: what it leaves open is as it was settled.

    On another device, kernel and micro-batch are chosen anew.
    """
    if config.model.device != saved.model.device:
        saved = dataclasses.replace(saved, kernel=None, micro_batch_size=None)
        if config.kernel == "attention":
            config = dataclasses.replace(config, kernel=None)
    left_open = [
        field.name for field in dataclasses.fields(config) if getattr(config, field.name) is None
    ]
    return dataclasses.replace(config, **{name: getattr(saved, name) for name in left_open})


def _first_pass(run: Run, steps: Preconditioned) -> None:
    """Let the fit see the first tokens of the text, and start a new lens from them.

    The steps of a new lens go on with the text that follows.
    """
    config, model = run.config, run.model.identity
    shape = (model.n_layers, model.d_model)
    sums, left = LeastSquares(*shape), config.init_tokens or 0
    batches = run.splits.train.batches(config.batch_size or 1, config.seed)
    run.progress.init_tokens = 0
    with progress_bar(left, "closed form", show=run.is_main) as bar:
        while left > 0:
            batch = next(batches)
            for states in run.reader.read(batch.input_ids):
                sums.add(states[:-1], states[-1])
            left -= run.tokens_per_step
            run.progress.init_tokens += run.tokens_per_step
            bar.update(run.tokens_per_step)
    if run.progress.step == 0:
        run.progress.position = batch.position
    sums.reduce(run.accelerator)
    ridge: float | Tensor
    if config.ridge is None:
        ridge = sums.best_ridge(run.held_out.least_squares(*shape))
    else:
        ridge = config.ridge
    steps.start(sums, sums.solve(ridge), from_there=run.progress.step == 0)


def _mean_jacobian(run: Run, stop: threading.Event) -> JacobianLens:
    """The lens whose translators are the mean Jacobians over the first tokens of the text."""
    config, model, accelerator = run.config, run.model, run.accelerator
    jacobian = MeanJacobian(
        model.identity.n_layers,
        model.identity.d_model,
        targets=config.jacobian_targets,
        skipped=max(SKIPPED_POSITIONS, config.skip_first),
        seed=config.seed,
    )
    left = config.init_tokens or 0
    batches = run.splits.train.batches(config.batch_size or 1, config.seed)
    with progress_bar(left, "jacobian", show=run.is_main) as bar:
        while left > 0:
            if stop.is_set():
                raise KeyboardInterrupt
            share = run.reader.share(next(batches).input_ids)
            for blocks in share.split(config.micro_batch_size or len(share)):
                with run.reader.autocast():
                    jacobian.add(model, blocks)
            left -= run.tokens_per_step
            run.progress.init_tokens += run.tokens_per_step
            bar.update(run.tokens_per_step)
    jacobian.reduce(accelerator)
    return JacobianLens.from_jacobians(model, jacobian.mean.float())


def _take_steps(run: Run, tracker: Tracker, stop: threading.Event) -> None:
    """The loop, from where the run stands to its last step."""
    config, progress = run.config, run.progress
    most = budget(config)
    looks = progress.curve.looks
    if not looks:
        _note(run, tracker)
    started = saved = time.monotonic()
    steps_taken = 0
    batches = run.splits.train.batches(config.batch_size or 1, config.seed, progress.position)
    with progress_bar(most, config.fit, progress.tokens, run.is_main) as bar:
        while progress.tokens < most:
            flat = progress.curve.flat_layers()
            active = [config.tokens is not None or not is_flat for is_flat in flat]
            if not any(active):
                break
            try:
                batch = next(batches)
            except TextRanOutError as error:
                if config.tokens is None:  # no number was promised
                    if run.is_main:
                        say(f"{error.args[0].split(';')[0]}: the run ends here")
                    if looks[-1].step < progress.step:
                        _note(run, tracker)
                    break
                run.save()
                raise
            kl = _gradient(run, batch.input_ids, active)
            kl, stopping = _reduce(run, kl, stop.is_set())
            run.steps.step(active, progress.tokens / most)
            steps_taken += 1
            progress.step += 1
            progress.tokens += run.tokens_per_step
            progress.position = batch.position
            bar.update(run.tokens_per_step)

            if progress.step % _STEPS_PER_FIGURE == 0:
                if not config.vocab_sample:  # else it is an estimate, and no KL to report
                    mean = kl.sum().item() / sum(active)
                    tracker.log({"train/kl_nats": mean}, progress.step)
                bar.set_postfix_str(f"held-out KL {looks[-1].mean_kl_nats:.3f} nats")
            if steps_taken in (1, 1 + _STEPS_BEFORE_ESTIMATE):
                kl.sum().item()  # waits for the device
                if steps_taken > 1 and run.is_main:
                    seconds = (time.monotonic() - started) / _STEPS_BEFORE_ESTIMATE
                    _say_how_long(run, seconds, most)
                started = time.monotonic()
            due = next_look([look.step for look in looks])
            if progress.step >= due or progress.tokens >= most:
                _note(run, tracker)
            if stopping and progress.tokens < most:
                run.save()
                raise Interrupted(f"stopped after {progress.tokens:,} tokens")
            if time.monotonic() - saved > _SECONDS_PER_SAVE:
                run.save()
                saved = time.monotonic()
    run.save()


def _say_how_long(run: Run, seconds_per_step: float, most: int) -> None:
    """Say how long the steps that are left take, with the looks between them."""
    steps = -(-(most - run.progress.tokens) // run.tokens_per_step)
    looks = max(0, count_looks(-(-most // run.tokens_per_step)) - len(run.progress.curve.looks))
    minutes = (steps * seconds_per_step + looks * run.look_seconds) / 60
    at_most = "at most " if run.config.tokens is None else "about "
    say(
        f"{run.tokens_per_step / seconds_per_step:,.0f} tokens a second: "
        f"{at_most}{max(1, round(minutes))} more minute{'s' * (round(minutes) > 1)}"
    )


def _note(run: Run, tracker: Tracker) -> None:
    """Look at held-out text, and say what is seen."""
    look = run.look()
    if not math.isfinite(look.mean_kl_nats):
        raise InputError(
            f"held-out KL is {look.mean_kl_nats} after {look.tokens:,} tokens, so the steps are "
            f"too large; give a smaller --lr than {run.config.lr:g}"
        )
    if run.is_main:
        seen = look.tokens + run.progress.init_tokens
        error = f" ± {look.standard_error:.4f}" if look.standard_error else ""
        by_layer = " ".join(f"{kl:.3f}" for kl in look.kl_nats)
        say(
            f"{seen:>11,} tokens {look.seconds:>5.0f} s   held-out KL "
            f"{look.mean_kl_nats:.4f}{error} nats   by layer {by_layer}"
        )
    figures = {f"held_out/kl_nats/{layer}": value for layer, value in enumerate(look.kl_nats)}
    tracker.log(figures, look.step)


def _gradient(
    run: Run, input_ids: Int[Tensor, "batch seq"], active: list[bool]
) -> Float[Tensor, " layers"]:
    """Leave this process's share of the gradient; return its share of the mean KL.

    From a sample of the vocabulary, the states of the whole step are held until the sample is
    drawn: it depends on all tokens of the step, so that it does not depend on how they are cut
    into micro-batches and processes.
    """
    objective, size = run.objective, run.config.vocab_sample or 0
    layers = [layer for layer, learns in enumerate(active) if learns]
    kl = torch.zeros(len(active), device=run.model.device)

    def accumulate(states: list[Tensor], model: ModelSide, keys: Keys) -> None:
        share = len(states[-1]) / run.tokens_per_step
        kl.add_(
            accumulate_gradient(
                run.steps.lens,
                states,
                objective,
                model=model,
                keys=keys,
                layers=layers,
                fraction=share,
            )
        )

    if not size:
        for states in run.reader.read(input_ids):
            accumulate(states, objective.model_side(states[-1]), objective.keys())
        return kl
    usage = torch.zeros(run.model.identity.vocab_size, device=run.model.device)
    held = [
        (states, objective.model_side(states[-1], usage)) for states in run.reader.read(input_ids)
    ]
    reduce_sums(run.accelerator, usage)
    keys = objective.keys(draw_sample(usage, size, run.config.seed, run.progress.step))
    while held:
        accumulate(*held.pop(0), keys)
    return kl


def _reduce(
    run: Run, kl: Float[Tensor, " layers"], stop: bool
) -> tuple[Float[Tensor, " layers"], bool]:
    """Add up gradients and KL of all processes, in one go; stop if any was asked to."""
    if run.accelerator.num_processes == 1:
        return kl, stop
    gradients = [part.grad for part in run.steps.lens.parameters() if part.grad is not None]
    parts = [*gradients, kl, kl.new_tensor([float(stop)])]
    total = run.accelerator.reduce(torch.cat([part.flatten() for part in parts]), "sum")
    for part, value in zip(parts, total.split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view_as(part))
    return kl, bool(parts[-1].item())


def _require_usable(output: Path, resume: bool) -> None:
    files.require_writable(output)
    if resume:
        return
    if (output / checkpoint.STATE).exists():
        raise InputError(
            f"{output} holds an interrupted run: go on with --resume {output}, or choose another "
            "--output"
        )
    if (output / checkpoint.MANIFEST).exists():
        raise InputError(
            f"{output} holds a lens: choose another --output, or extend it with "
            f"--resume {output} and more --tokens"
        )


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM, so that a step is never cut in two; a second one kills."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(number: int, _frame: object) -> None:
        flag.set()
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {
        number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
