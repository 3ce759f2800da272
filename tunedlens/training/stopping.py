"""How a run is asked to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop. It is saved and can be resumed."""


@contextmanager
def stop_flag(*, show: bool = True) -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM or a lost terminal sets, so that a step is never cut in two.

    A second signal has its usual effect. A signal that is ignored, as SIGHUP is under `nohup`,
    stays ignored. Outside the main thread, signals are left alone.

    Args:
        show: whether to print a message as soon as a signal arrives.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(number: int, _frame: object) -> None:
        flag.set()
        signal.signal(number, previous[number])
        if show:
            # `print` must not be called here: the signal may have interrupted one.
            with suppress(OSError):
                os.write(2, b"\nstopping after this step (interrupt again to stop at once)\n")

    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    previous = {number: old for number, old in previous.items() if old != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, ask)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
