"""Stopping a run between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop. It is saved and can be resumed."""


@contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is never cut in two.

    A second signal has its usual effect. Outside the main thread, signals are left alone.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(number: int, _frame: object) -> None:
        flag.set()
        signal.signal(number, previous[number])

    numbers = (int(signal.SIGINT), int(signal.SIGTERM))
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, ask)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
