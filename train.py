"""Train a tuned lens; `python train.py --help` says how. The same as `tunedlens train`."""

import sys

from tunedlens.cli.train import train_command

if __name__ == "__main__":
    sys.exit(train_command())
