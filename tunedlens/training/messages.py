"""The lines that a run prints."""

import time

from jaxtyping import Float
from torch import Tensor

from tunedlens.config import ONE_PASS
from tunedlens.corpus import DEFAULT_HUB_DATASET, SELF
from tunedlens.training.plan import count_validations
from tunedlens.training.run import Progress, Run

_TIMED_STEPS = 4
"""Steps that are timed to estimate the rest, after the first one, which is slower."""


def describe(run: Run) -> None:
    """Print the plan."""
    plan, identity, text = run.plan, run.model.identity, run.splits.train.about
    run.say(f"output    {run.output}")
    run.say(
        f"model     {identity.name}: {identity.n_layers} layers, d_model {identity.d_model}, "
        f"vocabulary {identity.vocab_size:,}, {plan.model.dtype} on {run.model.device}"
    )
    remarks = {DEFAULT_HUB_DATASET: " (the default; see --dataset)", SELF: " (sampled)"}
    run.say(f"text      {text['dataset']}{remarks.get(plan.corpus.dataset, '')}")
    blocks = f"blocks of {plan.corpus.seq_len} tokens"
    if text.get("streamed"):
        window = plan.shuffle_window
        order = f", in random order within windows of {window:,} blocks" if window else ""
        run.say(f"          streamed, in {blocks}{order}")
    else:
        run.say(
            f"          {text['bytes']:,} bytes, {text['tokens']:,} tokens; {blocks}: "
            f"{text['blocks']:,} for training, {run.splits.validation.about['blocks']:,} held out; "
            f"{text['dropped_tokens']} leftover tokens dropped"
        )
    if plan.layers is not None:
        run.say(f"layers    {plan.layers}")
    if plan.low_rank is not None:
        run.say(f"rank      at most {plan.low_rank}")
    if plan.fit in ONE_PASS:
        run.say(f"fit       {plan.fit}: {plan.init_tokens:,} tokens, {plan.precision} products")
        return
    processes = run.accelerator.num_processes
    if run.shards.is_divided:
        run.say(f"layers    divided among {processes} processes")
    if plan.batch_size < processes:
        run.say(
            f"note      a step has {plan.batch_size} blocks, so {processes - plan.batch_size} of "
            f"{processes} processes are idle; use a larger --batch-size or a smaller --seq-len"
        )
    tokens = f"{plan.budget:,} tokens"
    if plan.tokens is None:
        tokens = f"at most {tokens}, until held-out KL has converged"
    if plan.fit == "preconditioned":
        tokens = f"{plan.init_tokens:,} tokens for the closed form, then {tokens}"
    run.say(f"fit       {plan.fit}: {tokens}; {plan.step_tokens:,} per step")
    rows = "the whole vocabulary"
    if plan.vocab_sample:
        rows = f"a sample of {plan.vocab_sample:,} tokens of the vocabulary"
    run.say(f"gradient  from {rows}; {plan.precision}, kernel: {plan.kernel}")
    held_out = run.validation_set
    table = min(run.costs.table_tokens(plan.budget), held_out.table_positions)
    run.say(
        f"held out  {held_out.tokens:,} tokens for validation, "
        f"{'' if plan.evaluate_tokens else 'at most '}{table:,} for the table at the end"
    )


def say_validation(run: Run, progress: Progress) -> None:
    """Print the last validation in one line."""
    result = progress.history[-1]
    tokens = result.tokens + progress.init_tokens
    error = f" ± {result.standard_error:.4f}" if result.standard_error else ""
    lines: dict[str, list[str]] = {}
    for point, kl in zip(run.reader.points, result.kl_nats, strict=True):
        lines.setdefault(point.site, [point.site] if lines else []).append(f"{kl:.3f}")
    by_layer = " | ".join(map(" ".join, lines.values()))
    run.say(
        f"{tokens:>11,} tokens {result.seconds:>5.0f} s   held-out KL "
        f"{result.mean_kl_nats:.4f}{error} nats   by layer {by_layer}"
    )


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
        seconds_per_step = (time.monotonic() - self._started) / _TIMED_STEPS
        self._started = time.monotonic()
        if self._steps == 1:
            return
        run, plan = self._run, self._run.plan
        steps = -(-(plan.budget - progress.tokens) // plan.step_tokens)
        validations = max(0, count_validations(plan.steps) - len(progress.history))
        seconds = steps * seconds_per_step + validations * run.validation_set.seconds
        minutes = max(1, round(seconds / 60))
        run.say(
            f"{plan.step_tokens / seconds_per_step:,.0f} tokens per second: "
            f"{'at most' if plan.tokens is None else 'about'} {minutes} more "
            f"minute{'s' * (minutes > 1)}"
        )
