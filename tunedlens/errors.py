"""The exception for a caller's mistakes, and parts of its messages."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An invalid argument, setting or file.

    The message states what was expected, what was given and what to do. The commands print it as
    one line.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the most similar known one, if there is one."""
    similar = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {similar[0]}?" if similar else ""
