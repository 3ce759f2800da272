"""Train a tuned lens, as `tunedlens train` does. `python train.py --help` lists the flags."""

import sys

from tunedlens.cli.train import train_command

if __name__ == "__main__":
    sys.exit(train_command())
