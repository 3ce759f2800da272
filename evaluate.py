"""Evaluate lenses, as `tunedlens evaluate` does. `python evaluate.py --help` lists the flags."""

import sys

from tunedlens.cli.evaluate import evaluate_command

if __name__ == "__main__":
    sys.exit(evaluate_command())
