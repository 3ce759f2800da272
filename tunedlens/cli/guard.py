"""What every command does around its work: quiet libraries, memory, errors in one line."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence

import huggingface_hub
import transformers

from tunedlens.errors import InputError
from tunedlens.escaping import printable

Arguments = Sequence[str] | None

INTERRUPTED = 130
"""Exit status."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`."""


def keep_freed_memory() -> None:
    """Let the C allocator reuse freed memory instead of returning it to the system.

    By default glibc maps every large tensor anew and unmaps it when it is freed, so a forward
    pass on a CPU spends a fifth to a third of its time on page faults. The setting affects the
    whole process, so the commands make it, not the library. It does nothing if the C library is
    not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def command(run: Callable[[Arguments], int]) -> Callable[[Arguments], int]:
    """Make a command: a user's mistake prints one line and returns a status other than 0."""

    @functools.wraps(run)
    def guarded(arguments: Arguments = None) -> int:
        # Progress bars of short operations would hide the messages that matter.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        huggingface_hub.logging.set_verbosity_error()
        keep_freed_memory()
        try:
            return run(arguments)
        except InputError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    return guarded
