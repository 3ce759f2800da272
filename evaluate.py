"""Evaluate a lens; `python evaluate.py --help` says how. The same as `tunedlens evaluate`."""

import sys

from tunedlens.cli.evaluate import evaluate_command

if __name__ == "__main__":
    sys.exit(evaluate_command())
