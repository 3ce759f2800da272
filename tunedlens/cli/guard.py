"""The wrapper of every command: silences libraries, sets up memory, prints errors as one line."""

import ctypes
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import huggingface_hub
import transformers

from tunedlens.distributed import lost_process
from tunedlens.errors import InputError
from tunedlens.escaping import printable

Arguments = Sequence[str] | None

INTERRUPTED = 130
"""The exit status of an interrupted command."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`."""


def keep_freed_memory() -> None:
    """Let the C allocator reuse freed memory instead of returning it to the system.

    By default, glibc maps every large tensor and unmaps it when it is freed, so a forward
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


def _in_one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"


def keep_streams_open() -> None:
    """Let a command continue when its output is not read: `| head`, or a closed stream."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end
        elif isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Flush the output. Output that cannot be written is dropped without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
        original, warnings.formatwarning = warnings.formatwarning, _in_one_line
        keep_streams_open()
        try:
            return run(arguments)
        except InputError as error:
            _complain(f"error: {printable(str(error))}")
            return 2
        except RuntimeError as error:
            if (reason := lost_process(error)) is None:
                raise
            _complain(
                f"error: another process has ended or does not answer ({printable(reason)}); "
                "to continue training from the last saved state, use --resume"
            )
            return 1
        except KeyboardInterrupt:
            _complain("interrupted")
            return INTERRUPTED
        finally:
            warnings.formatwarning = original
            close_streams()

    return guarded


def _complain(message: str) -> None:
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr)
