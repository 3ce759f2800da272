"""The entry point of the commands. Ctrl-C during the imports prints one line, not a traceback.

Importing `tunedlens` takes seconds, so this module is outside of it.
"""

import os
import signal
from contextlib import suppress


def main(name: str | None = None) -> int:
    """Run one command, or the one that the arguments name. Returns the exit status."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)
    from tunedlens import cli

    signal.signal(signal.SIGINT, handler)
    return cli.main() if name is None else cli.COMMANDS[name]()


def _stop(*_: object) -> None:
    # A KeyboardInterrupt would be taken for a missing package by some of those that are imported.
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)
