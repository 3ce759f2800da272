"""Train a tuned lens; `python train.py --help` says how. The same as `tunedlens train`."""

import sys

from tunedlens_command import main

if __name__ == "__main__":
    sys.exit(main("train"))
