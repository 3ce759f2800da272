"""Evaluate a lens; `python evaluate.py --help` says how. The same as `tunedlens evaluate`."""

import sys

from tunedlens_command import main

if __name__ == "__main__":
    sys.exit(main("evaluate"))
