"""The command line: `train` and `evaluate`, with flags made from the configs' fields."""

import os
import sys
from collections.abc import Callable, Sequence

import transformers

from tunedlens.cli.evaluate import evaluate_lenses
from tunedlens.cli.memory import keep_freed_memory
from tunedlens.cli.train import INTERRUPTED, train_lens
from tunedlens.errors import InputError


def train_command(arguments: Sequence[str] | None = None) -> int:
    """`python train.py` and `tunedlens train`. Returns the exit status."""
    return _guarded(train_lens, arguments)


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    """`python evaluate.py` and `tunedlens evaluate`. Returns the exit status."""
    return _guarded(evaluate_lenses, arguments)


def main() -> int:
    """The console script `tunedlens`."""
    commands = {"train": train_command, "evaluate": evaluate_command}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        return commands[sys.argv[1]](sys.argv[2:])
    print("usage: tunedlens {train,evaluate} [--help | flags]", file=sys.stderr)
    return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2


def _guarded(
    command: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None
) -> int:
    """Run a command; a mistake of the user prints one line and returns a status other than 0."""
    # Progress bars of short operations would hide the messages that matter.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    keep_freed_memory()
    try:
        return command(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
