"""`python -m tunedlens` is the command `tunedlens`."""

import sys

from tunedlens.cli import main

if __name__ == "__main__":
    sys.exit(main())
