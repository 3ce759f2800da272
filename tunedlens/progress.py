"""Messages and the progress bar, in a terminal, in a notebook and in a log file."""

import sys
import time
from contextlib import suppress
from typing import Self, TypeAlias

from tqdm.auto import tqdm

from tunedlens.escaping import for_terminal

_FIRST_LINE, _LONGEST_SILENCE = 10, 300
"""Seconds until the first line of progress, and at most between two lines."""


def say(message: str, *, has_colors: bool = False) -> None:
    """Print lines, above the progress bar if there is one.

    Printing never stops a run: letters that the terminal's encoding lacks are escaped, and if the
    output is no longer read (`| head`, a closed terminal), nothing is printed.

    Args:
        has_colors: whether the message comes from this package and may contain colour codes.
    """
    message = message if has_colors else for_terminal(message)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    message = message.encode(encoding, "backslashreplace").decode(encoding)
    with suppress(OSError, ValueError):  # ValueError: the file is closed
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


class ProgressLines:
    """Progress as lines on standard error, which are printed less and less often.

    Args:
        total: tokens of the whole.
        description: what is being done.
        done: tokens that are done already.
    """

    def __init__(self, total: int, description: str, done: int = 0) -> None:
        self._description = description
        self.reset(total)
        self._done = self._before = done

    def reset(self, total: int) -> None:
        """Begin anew with another total."""
        self.total, self._done, self._before = total, 0, 0
        self._start = self._last_line = time.monotonic()

    def update(self, tokens: int) -> None:
        """Count more tokens."""
        self._done += tokens
        now = time.monotonic()
        silence = min(max(_FIRST_LINE, self._last_line - self._start), _LONGEST_SILENCE)
        if now - self._last_line < silence or self._done >= self.total:
            return
        self._last_line = now
        seconds_per_token = (now - self._start) / max(1, self._done - self._before)
        minutes = max(1, round((self.total - self._done) * seconds_per_token / 60))
        with suppress(OSError, ValueError):
            print(
                f"{self._description}: {self._done:,} of {self.total:,} tokens, "
                f"about {minutes} more minute{'s' * (minutes > 1)}",
                file=sys.stderr,
                flush=True,
            )

    def set_postfix_str(self, text: str) -> None:
        """Only a bar shows further text."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left open."""


ProgressBar: TypeAlias = tqdm | ProgressLines


def progress_bar(
    total_tokens: int, description: str, done: int = 0, show: bool = True
) -> ProgressBar:
    """A bar that counts tokens and shows their rate and the remaining time.

    If standard error is not a terminal, as in a log file, lines are printed instead.
    """
    if show and not (sys.stderr.isatty() or is_notebook()):
        return ProgressLines(total_tokens, description, done)
    return tqdm(
        total=total_tokens,
        initial=done,
        desc=description,
        unit="tok",
        unit_scale=True,
        smoothing=0.1,
        disable=not show,
        dynamic_ncols=True,
        leave=False,
    )


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules
