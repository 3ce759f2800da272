"""What a run prints."""

import time

from jaxtyping import Float
from torch import Tensor

from tunedlens.config import ONE_PASS
from tunedlens.corpus import DEFAULT_HUB_DATASET
from tunedlens.errors import InputError
from tunedlens.tracking import say
from tunedlens.training.costs import count_validations
from tunedlens.training.plan import TrainPlan
from tunedlens.training.run import Progress, Run

_TIMED_STEPS = 4
"""Steps that are timed to estimate the rest, after the first one, which is slower."""


def describe(run: Run) -> None:
    """Print the plan."""
    if not run.is_main:
        return
    plan, identity, text = run.plan, run.model.identity, run.splits.train.about
    say(f"output    {run.output}")
    say(
        f"model     {identity.name}: {identity.n_layers} layers, d_model {identity.d_model}, "
        f"vocabulary {identity.vocab_size:,}, {plan.model.dtype} on {run.model.device}"
    )
    by_default = plan.corpus.dataset == DEFAULT_HUB_DATASET
    say(f"text      {text['dataset']}{' (the default; see --dataset)' if by_default else ''}")
    blocks = f"blocks of {plan.corpus.seq_len} tokens"
    if text.get("streamed"):
        say(f"          streamed, in {blocks}")
    else:
        say(
            f"          {text['bytes']:,} bytes, {text['tokens']:,} tokens; {blocks}: "
            f"{text['blocks']:,} for training, {run.splits.validation.about['blocks']:,} held out; "
            f"{text['dropped_tokens']} leftover tokens dropped"
        )
    _describe_fit(plan)
    if plan.fit in ONE_PASS:
        return
    say(
        f"held out  {run.validation_set.tokens:,} tokens for validation, "
        f"{'' if plan.evaluate_tokens else 'at most '}{run.costs.table_tokens(plan.budget):,} for "
        "the table at the end"
    )


def _describe_fit(plan: TrainPlan) -> None:
    if plan.fit in ONE_PASS:
        say(f"fit       {plan.fit}: {plan.init_tokens:,} tokens, {plan.precision} products")
        return
    tokens = (
        f"at most {plan.max_tokens:,} tokens, until held-out KL has converged"
        if plan.tokens is None
        else f"{plan.tokens:,} tokens"
    )
    is_default = plan.fit == "preconditioned"
    first = f"{plan.init_tokens:,} tokens for the closed form, then " if is_default else ""
    say(f"fit       {plan.fit}: {first}{tokens}; {plan.step_tokens:,} per step")
    rows = (
        f"a sample of {plan.vocab_sample:,} tokens of the vocabulary"
        if plan.vocab_sample
        else "the whole vocabulary"
    )
    say(f"gradient  from {rows}; {plan.precision}, kernel: {plan.kernel}")


def say_validation(run: Run, progress: Progress) -> None:
    """Print the last validation in one line."""
    if not run.is_main:
        return
    result = progress.history[-1]
    tokens = result.tokens + progress.init_tokens
    error = f" ± {result.standard_error:.4f}" if result.standard_error else ""
    by_layer = " ".join(f"{kl:.3f}" for kl in result.kl_nats)
    say(
        f"{tokens:>11,} tokens {result.seconds:>5.0f} s   held-out KL "
        f"{result.mean_kl_nats:.4f}{error} nats   by layer {by_layer}"
    )


def say_text_ran_out(run: Run, error: InputError) -> None:
    """Say that a run without a budget ends with its text."""
    if run.is_main:
        say(f"{error.args[0].split(';')[0]}: the run ends here")


class TimeLeft:
    """Prints once, after a few steps, how long the run takes."""

    def __init__(self, run: Run) -> None:
        self._run, self._steps, self._started = run, 0, 0.0

    def after_step(self, progress: Progress, kl: Float[Tensor, " layers"]) -> None:
        """Count a step; print the estimate if it is the last of the timed ones."""
        self._steps += 1
        if self._steps not in (1, 1 + _TIMED_STEPS):
            return
        kl.sum().item()  # waits for the device
        if self._steps > 1 and self._run.is_main:
            self._say(progress, (time.monotonic() - self._started) / _TIMED_STEPS)
        self._started = time.monotonic()

    def _say(self, progress: Progress, seconds_per_step: float) -> None:
        plan = self._run.plan
        steps = -(-(plan.budget - progress.tokens) // plan.step_tokens)
        validations = max(0, count_validations(plan.steps) - len(progress.history))
        seconds = steps * seconds_per_step + validations * self._run.validation_set.seconds
        minutes = max(1, round(seconds / 60))
        say(
            f"{plan.step_tokens / seconds_per_step:,.0f} tokens per second: "
            f"{'at most' if plan.tokens is None else 'about'} {minutes} more "
            f"minute{'s' * (minutes > 1)}"
        )
