"""The commands, which Ctrl-C ends in one line even while packages are being imported.

That takes seconds and begins with `tunedlens` itself, so this module is outside it.
"""

import sys


def main(name: str | None = None) -> int:
    """Run one command, or the one that the arguments name. Returns the exit status."""
    try:
        from tunedlens import cli

        return cli.main() if name is None else cli.COMMANDS[name]()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
