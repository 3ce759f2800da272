"""The command line: its commands, with flags made from the configs' fields."""

import sys

from tunedlens.cli.card import card_command
from tunedlens.cli.doctor import doctor_command
from tunedlens.cli.evaluate import evaluate_command
from tunedlens.cli.listing import list_command
from tunedlens.cli.plan import plan_command
from tunedlens.cli.train import train_command
from tunedlens.errors import did_you_mean
from tunedlens.provenance import own_version

__all__ = [
    "card_command",
    "doctor_command",
    "evaluate_command",
    "list_command",
    "main",
    "plan_command",
    "train_command",
]

USAGE = """usage: tunedlens COMMAND [flags]

  train       train a lens
  evaluate    score lenses on a text, or show a prompt through the layers
  list        show the saved lenses
  plan        show the memory and time that a training run needs
  doctor      check a model, and a lens for it
  card        measure a lens and write its card

tunedlens COMMAND --help lists the flags of a command; tunedlens --version prints the version.
"""


def main() -> int:
    """The console script `tunedlens`."""
    commands = {
        "train": train_command,
        "evaluate": evaluate_command,
        "doctor": doctor_command,
        "list": list_command,
        "plan": plan_command,
        "card": card_command,
    }
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        return commands[sys.argv[1]](sys.argv[2:])
    if sys.argv[1:] == ["--version"]:
        print(f"tunedlens {own_version()}")
        return 0
    if sys.argv[1:] and (hint := did_you_mean(sys.argv[1], commands)):
        print(f"error: there is no command {sys.argv[1]}{hint}", file=sys.stderr)
        return 2
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    print(USAGE, end="", file=sys.stderr)
    return 2
