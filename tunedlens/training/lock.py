"""A lock on the folder of a run, so that no two runs write to the same folder."""

import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from accelerate.utils import broadcast_object_list

from tunedlens.errors import InputError
from tunedlens.files import now

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"


@contextmanager
def locked(folder: Path, *, is_main: bool = True) -> Iterator[None]:
    """Keep other runs out of a folder, which is created if it does not exist.

    The operating system releases the lock when its process ends for any reason, so the file that a
    killed run leaves behind does not block other runs. The file names the host, the process and the
    time of the lock.

    Args:
        is_main: whether this process takes the lock; the others wait for it.

    Raises:
        InputError: another run holds the lock, or the folder cannot be written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    file, problem = None, None
    if is_main:
        try:
            file = _acquire(folder)
        except InputError as error:
            problem = str(error)
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise InputError(problem)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                (folder / LOCK).unlink()
            file.close()
            with suppress(OSError):  # a run that saved nothing leaves no folder behind
                for path in missing:
                    path.rmdir()


def _acquire(folder: Path) -> IO[str]:
    """The open file that holds the lock until it is closed."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+")
            if _try_to_lock(file) and not _is_same_file(file, path):
                file.close()  # its owner has removed it meanwhile
                continue
            file.truncate(0)
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "time": now()}, file)
            file.flush()
            return file
    except BlockingIOError as error:
        file.seek(0)
        raise InputError(
            f"{folder} is in use by another run ({file.read().strip()}); wait until it ends, or "
            "choose another --output"
        ) from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}; choose another --output") from error


def _try_to_lock(file: IO[str]) -> bool:
    """Lock a file; returns whether the file system has locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        raise
    except OSError as error:
        warnings.warn(
            f"{file.name} cannot be locked ({error}); do not start another run in its folder",
            stacklevel=2,
        )
    return False


def _is_same_file(file: IO[str], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
