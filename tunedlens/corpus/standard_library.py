"""The embedded text: the source of the standard library of the running Python."""

import hashlib
import sys
import sysconfig
import tokenize
from pathlib import Path
from typing import Literal, NamedTuple

HELD_OUT_FRACTION = 0.06
"""The fraction of documents that is held out, by a hash of the text or, for files of the
standard library, of the path."""

_TESTS = {"test", "tests", "idle_test"}


class SourceFile(NamedTuple):
    """One file of the standard library."""

    path: str
    """Relative to the library's folder, with forward slashes."""
    text: str


def hash_fraction(name: str | bytes) -> float:
    """A number in [0, 1) that depends on the name alone, so that splits are stable."""
    data = name.encode() if isinstance(name, str) else name
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def standard_library(split: Literal["train", "validation"]) -> list[SourceFile]:
    """Read the standard library of the running Python, sorted by path.

    It contains the modules that Python lists as its own: no tests, no installed packages and no
    files generated when this Python was built. Each file is decoded in the encoding that it
    declares, and is in the same split in every Python version.

    Raises:
        FileNotFoundError: this Python has no source files of its standard library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        own = relative.parts[0].removesuffix(".py") in sys.stdlib_module_names
        if not own or _TESTS.intersection(relative.parts[:-1]):
            continue
        path = relative.as_posix()
        if (hash_fraction(path) < HELD_OUT_FRACTION) == (split == "validation"):
            with tokenize.open(file) as source:
                files.append(SourceFile(path, source.read()))
    if not files:
        raise FileNotFoundError(f"{root} has no source files of Python's standard library")
    return sorted(files)
