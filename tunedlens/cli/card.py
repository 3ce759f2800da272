"""`tunedlens card`: measures the quality of a lens and writes its card."""

import argparse
import sys
from pathlib import Path

from tunedlens import checkpoint, files
from tunedlens.cli.flags import count, make_parser, parse
from tunedlens.cli.guard import Arguments, command
from tunedlens.config import ModelConfig, configured
from tunedlens.distributed import join_processes
from tunedlens.evaluation import measure_quality
from tunedlens.evaluation.lens_specs import SavedLens, model_as_trained
from tunedlens.progress import say
from tunedlens.report import write_card
from tunedlens.report.tables import plus_minus

CARD = """Measure a lens and write its card: KL by layer, bias, transfer, convergence, warnings.

  tunedlens card checkpoints/RUN
  tunedlens card checkpoints/RUN --also other.txt      also measure the KL on another text
  tunedlens card user/name --dataset text.txt          a lens on the hub

The card is README.md in the folder of the lens, with pictures in card/.
"""


@command
def card_command(arguments: Arguments = None) -> int:
    """`tunedlens card`. Returns the exit status."""
    flags = parse(_parser(), arguments)
    command = ["tunedlens", "card", *(sys.argv[2:] if arguments is None else arguments)]
    source = flags.pop("lens", None) or str(checkpoint.newest_lens(checkpoint.ROOT))
    saved = SavedLens.read("", source)
    folder = flags.pop("output", saved.results_folder)
    measured = {name: flags.pop(name) for name in ("dataset", "also", "tokens") if name in flags}
    config = configured(model_as_trained(ModelConfig(), [saved]), flags)
    files.require_writable(folder)

    accelerator = join_processes(config.device)
    quality = measure_quality(
        source, **measured, model=config, accelerator=accelerator, command=command
    )
    if not accelerator.is_main_process:
        return 0
    path = write_card(quality, folder)
    kl = plus_minus(quality.own.of_lens(quality.lens, "kl_nats"))
    say(f"mean KL(model ‖ lens) on {quality.own.tokens:,} positions: {kl} nats")
    for warning in quality.warnings:
        say(f"warning: {warning.message}")
    say(f"the card is {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tunedlens card", CARD, ModelConfig)
    parser.add_argument(
        "lens",
        nargs="?",
        metavar="LENS",
        help="path of a lens, or name on the hub (default: the newest saved lens)",
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--dataset",
        metavar="NAME",
        help="text to score (default: the held-out part of the lens's training text)",
    )
    group.add_argument(
        "--also",
        action="append",
        metavar="NAME",
        help="another text on which the lens is scored; can be given several times",
    )
    group.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help="positions of each text to score (default: 65,536, or all if a text has fewer)",
    )
    group.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the card (default: the lens's own)"
    )
    return parser
