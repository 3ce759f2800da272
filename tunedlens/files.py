"""Atomic writes, JSON, and folders."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunedlens.errors import InputError

JsonObject = dict[str, Any]
"""An object as `json` reads it."""


def write(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it, so that it is never half-written.

    The folder is created if it does not exist.

    Raises:
        InputError: the file cannot be written.
    """
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise InputError(f"cannot write {path}: {error}") from error


def require_writable(folder: Path) -> None:
    """Check that a folder can be created or written to, without leaving anything behind.

    Raises:
        InputError: the folder cannot be made or written to.
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
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}; choose another --output") from error


def write_json(path: Path, data: object) -> None:
    """Write an object as JSON; numbers keep all their digits."""
    write(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def now() -> str:
    """The current time in UTC, in a form that sorts."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def read_json(path: Path, if_missing: str) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing, with `if_missing` as the message, or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(if_missing) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def newest_folder(folders: list[Path], created: Callable[[Path], str]) -> Path | None:
    """The folder with the latest time; folders whose time cannot be read are skipped."""
    found = []
    for folder in folders:
        with suppress(InputError, KeyError):
            found.append((created(folder), folder))
    return max(found)[1] if found else None
