"""Writes files completely or not at all."""

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from tunedlens.errors import InputError

_LONGEST_NAME = 150
_A_DAY = 24 * 60 * 60


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to. At the end, the file there replaces `path`.

    After a crash at any time, there is either the old file or the new one: the content is on the
    disk before the file is renamed, and the new name is on the disk before this returns. Temporary
    files of killed processes are removed.

    Args:
        path: its folder is created if it does not exist.

    Raises:
        InputError: the file cannot be written.
    """
    partial = path.with_name(f".{platform.node()}-{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except (OSError, UnicodeEncodeError) as error:
        raise InputError(f"cannot write {path}: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    _remove_abandoned(path)


def require_lens_name(name: str) -> None:
    """Check that the name of a lens can be used in the names of files.

    Raises:
        InputError: it cannot.
    """
    is_right = name.isprintable() and 0 < len(name.encode()) <= _LONGEST_NAME
    if not is_right or "/" in name or name.startswith("."):
        raise InputError(
            f"the name of a lens must be printable text of 1 to {_LONGEST_NAME} bytes, with no "
            f"slash and no dot at its start; got {name!r:.40}"
        )


def write(path: Path, content: str | bytes) -> None:
    """Write a file as `replacing` does.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, data: object) -> None:
    """Write an object as JSON; numbers keep all their digits."""
    write(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # Windows flushes only files that are open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files for `path` whose process has ended.

    The processes of other hosts are not visible, so their files count as abandoned after a day.
    """
    pattern = re.compile(rf"\.(.+)-(\d+)\.{re.escape(path.name)}")
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if found := pattern.fullmatch(name):
                is_gone = found[1] == platform.node() and not _is_alive(int(found[2]))
                partial = path.with_name(name)
                if is_gone or time.time() - partial.stat().st_mtime > _A_DAY:
                    partial.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Whether this host has a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to another user
        return True
    return True


def require_writable(folder: Path) -> None:
    """Check that a folder can be created or written to, without leaving anything behind.

    Raises:
        InputError: the folder cannot be created or written to.
    """
    try:
        existing = folder.absolute()
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        probe = existing / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write to {folder}: {error}; choose another --output") from error


def now() -> str:
    """The current time in UTC, in a form that sorts."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def newest_folder(folders: list[Path], created: Callable[[Path], str]) -> Path | None:
    """The folder with the latest time; folders whose time cannot be read are skipped."""
    found = []
    for folder in folders:
        with suppress(InputError, KeyError):
            found.append((created(folder), folder))
    return max(found)[1] if found else None
