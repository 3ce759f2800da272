"""`train.py`: trains a lens."""

import dataclasses
from pathlib import Path

from tunedlens import checkpoint, report
from tunedlens.checkpoint import saved_config
from tunedlens.cli.flags import add_wandb_flag, make_parser, parse
from tunedlens.cli.guard import INTERRUPTED, Arguments, command
from tunedlens.config import TrainConfig, configured
from tunedlens.distributed import join_processes
from tunedlens.errors import InputError
from tunedlens.progress import say
from tunedlens.training import CacheSettings, Interrupted, new_folder, train

TRAIN = """Train a tuned lens: one affine translator per layer of a frozen language model.

Without flags, it trains a lens for the GPT-2 that ships with the package, on its own text.

  tunedlens train --model gpt2 --dataset my-texts/ --tokens 5e6
  tunedlens train --resume                      continue the last interrupted run
  tunedlens train --resume RUN --tokens 2e6     extend a finished run
"""


@command
def train_command(arguments: Arguments = None) -> int:
    """`python train.py` and `tunedlens train`. Returns the exit status."""
    parser = make_parser("tunedlens train", TRAIN, TrainConfig)
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--output", type=Path, help="folder of the run (default: checkpoints/<model>-<time>)"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=checkpoint.ROOT,
        metavar="RUN",
        help="continue an interrupted run (by default the last one), or extend a finished one",
    )
    group.add_argument(
        "--cache-states",
        type=Path,
        metavar="DIR",
        help="folder where the model's states are stored for further runs on the same text",
    )
    group.add_argument(
        "--cache-gb",
        type=float,
        metavar="X",
        help="largest size of the folder of --cache-states, in gigabytes (default: 50)",
    )
    add_wandb_flag(group)
    flags = parse(parser, arguments)

    resume = flags.pop("resume", None)
    output, wandb = flags.pop("output", None), flags.pop("wandb", "disabled")
    if "cache_gb" in flags and "cache_states" not in flags:
        raise InputError("--cache-gb works only with --cache-states; give that too")
    states, limit = flags.pop("cache_states", None), flags.pop("cache_gb", 50.0)
    cache = None if states is None else CacheSettings(states, limit)
    if resume is not None and output is not None:
        raise InputError("--resume already names the folder of the run; leave out --output")
    if resume is None:
        config = configured(TrainConfig(), flags)
    else:
        output = checkpoint.newest_state(checkpoint.ROOT) if resume == checkpoint.ROOT else resume
        # On another device, these are chosen again unless there are flags for them.
        saved = dataclasses.replace(saved_config(output), kernel=None, micro_batch_size=None)
        config = configured(saved, flags)
    main = join_processes(config.model.device).is_main_process
    output = output or new_folder(config)
    try:
        evaluation = train(config, output, resume=resume is not None, wandb=wandb, cache=cache)
    except Interrupted as interrupted:
        if main:
            say(f"{interrupted}; continue with: tunedlens train --resume {output}")
        return INTERRUPTED
    if main:
        say(f"\nheld-out KL(model ‖ lens) on {evaluation.tokens:,} tokens, ± one standard error\n")
        say(report.kl_table(evaluation))
        say(f"\nsaved to {output}; for all metrics, run: tunedlens evaluate --lens {output}")
    return 0
