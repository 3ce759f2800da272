"""The one exception that a user of this package may meet by a mistake of theirs."""


class InputError(ValueError):
    """What was asked for cannot be done: says what was expected, what came, what to do.

    The command line prints it as one line; a library's caller can catch it.
    """


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
