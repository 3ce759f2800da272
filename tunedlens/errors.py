"""The exception for mistakes of the caller."""


class InputError(ValueError):
    """A request that cannot be fulfilled.

    The message says what was expected, what came and what to do. The commands print it as one line.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
