"""Access to the Hugging Face hub, also when it cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session

from tunedlens.errors import InputError, first_line

_PATIENCE_SECONDS = 5


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Read from the hub, or at once from its cache if the hub cannot be reached.

    Without it, the libraries that read from the hub repeat every request for half a minute.

    Raises:
        InputError: the hub cannot be reached, and what is read is not in the cache.
    """
    problem = _why_unreachable()
    if problem is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # the libraries raise many kinds of exception
        raise InputError(
            f"{constants.ENDPOINT} cannot be reached ({problem}), and the cache has no usable copy"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _why_unreachable() -> str | None:
    """The reason why the hub does not answer; None if it does, or if the user is offline."""
    if constants.is_offline_mode():
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_SECONDS)
    except Exception as error:  # of the HTTP client, which differs between versions
        return first_line(error)
    return None
