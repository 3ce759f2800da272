"""Messages and the progress bar, in a terminal and in a notebook."""

import sys
from contextlib import suppress

from tqdm.auto import tqdm

from tunedlens.escaping import for_terminal


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


def progress_bar(total_tokens: int, description: str, done: int = 0, show: bool = True) -> tqdm:
    """A bar that counts tokens and shows their rate and the remaining time."""
    return tqdm(
        total=total_tokens,
        initial=done,
        desc=description,
        unit="tok",
        unit_scale=True,
        smoothing=0.1,
        disable=not show or not (sys.stderr.isatty() or is_notebook()),
        dynamic_ncols=True,
        leave=False,
    )


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules
