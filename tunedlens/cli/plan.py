"""`tunedlens plan`: shows what a run needs before it is started."""

import math

from tunedlens.cli.flags import make_parser, parse
from tunedlens.cli.guard import Arguments, command
from tunedlens.config import TrainConfig, configured
from tunedlens.progress import say
from tunedlens.training.sizing import RunSize, size_run, ways_to_fit

PLAN = """Show what training a lens needs: memory by part, operations, tokens and hours.

Only the model's configuration is read or downloaded. The command takes the flags of `train`.

  tunedlens plan --model meta-llama/Llama-3.1-8B --dtype bfloat16 --gpus 8 --memory 80
  tunedlens plan --gpus 0 --memory 16                the built-in model on a CPU

The exit status is 1 if the run does not fit.
"""


@command
def plan_command(arguments: Arguments = None) -> int:
    """`tunedlens plan`. Returns the exit status."""
    parser = make_parser("tunedlens plan", PLAN, TrainConfig)
    group = parser.add_argument_group("the machine")
    group.add_argument("--gpus", type=int, metavar="N", help="0 plans for a CPU (default: 1)")
    group.add_argument(
        "--memory", type=float, metavar="X", help="gigabytes of one GPU, or of the machine on a CPU"
    )
    group.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="assumed speed of a device, in 10^12 operations per second (default: 100 for a GPU, "
        "which is 13%% of an H100's bfloat16 rate; 0.5 for a CPU)",
    )
    flags = parse(parser, arguments)
    gpus, memory, tflops = (
        flags.pop("gpus", 1),
        flags.pop("memory", None),
        flags.pop("tflops", None),
    )
    config = configured(TrainConfig(), flags)
    size = size_run(config, gpus=gpus, memory_gb=memory, tflops=tflops)
    for line in _lines(size):
        say(line)
    if size.limit is not None:
        _say_whether_it_fits(config, size)
    return 0 if size.fits else 1


def _lines(size: RunSize) -> list[str]:
    """The lines about the run, its memory by part and phase, its operations and its time."""
    shape, plan, costs = size.shape, size.plan, size.costs
    device = {"cpu": "CPU", "cuda": "GPU"}[size.device]
    share = f"one {device} each" if size.processes == size.devices else f"{size.devices} GPUs"
    share = share.removesuffix(" each") if size.processes == 1 else share
    processes = f"{size.processes} process{'es' if size.processes > 1 else ''}, {share}"
    processes += ", layers divided" if plan.shard_layers and size.processes > 1 else ""
    sampled = f"a sample of {plan.vocab_sample:,}" if plan.vocab_sample else "the whole vocabulary"
    points = len(plan.points(shape.n_layers))
    tokens = plan.init_tokens if plan.init_tokens and plan.budget == 0 else plan.budget
    longest = "" if plan.tokens is not None or not plan.budget else "at most "
    rate = size.flops_per_second / 1e12
    return [
        f"model     {shape.name}: {shape.n_layers} layers, d_model {shape.d_model:,}, vocabulary "
        f"{shape.vocab_size:,}, {shape.weights / 1e9:,.3g} billion weights",
        f"run       {plan.fit}, {points} translators, {plan.precision}, {sampled}; {processes}",
        "",
        *_memory_table(size),
        "",
        f"FLOPs     {costs.forward / 1e9:,.3g}e9 per token of a forward pass, "
        f"{costs.first_pass / 1e9:,.3g}e9 of the first pass, {costs.step / 1e9:,.3g}e9 of a step",
        f"tokens    {plan.init_tokens:,} for the first pass, {longest}{plan.budget:,} for the steps"
        if plan.budget
        else f"tokens    {tokens:,} for the first pass",
        f"time      {longest}{_duration(size.seconds)} at {rate:,.3g} TFLOP/s of each process",
    ]


def _memory_table(size: RunSize) -> list[str]:
    """Bytes by part, with a column for every phase of the run."""
    phases = size.memory.device
    unit, scale = ("GB", 1e9) if size.memory.peak >= 1e9 else ("MB", 1e6)
    rows = [[f"memory of a process, {unit}", *phases]]
    for part in size.memory.parts:
        cells = [parts.get(part, 0.0) / scale for parts in phases.values()]
        rows.append([part, *(f"{cell:,.1f}" if cell else "–" for cell in cells)])
    rows.append(["total", *(f"{sum(parts.values()) / scale:,.1f}" for parts in phases.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [f"{row[0]:<{widths[0]}}"]
            + [f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    if size.memory.host:
        lines.append(f"and {size.memory.host / scale:,.1f} {unit} of sums in the memory of the CPU")
    return lines


def _say_whether_it_fits(config: TrainConfig, size: RunSize) -> None:
    """Print whether the memory is enough, and which flags help if it is not."""
    assert size.limit is not None
    needed = f"{size.memory.peak / 1e9:,.3g} of {size.limit / 1e9:,.3g} GB"
    if size.fits:
        say(f"memory    enough: {needed}")
        return
    say(f"memory    not enough: {needed} (a tenth is reserved for libraries); it fits with one of:")
    ways = ways_to_fit(config, size)
    for flags, new in ways:
        say(f"  {flags}  ({new.memory.peak / 1e9:,.3g} GB, {_duration(new.seconds)})")
    if not ways:
        say("  more memory or, with --device-map auto, more GPUs; no other flags are enough")


def _duration(seconds: float) -> str:
    if seconds < 90:
        whole = math.ceil(seconds)
        return f"{whole} second{'s' * (whole > 1)}"
    return f"{seconds / 60:,.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} hours"
