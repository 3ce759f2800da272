"""Checks a table of text before a library parses it.

The parser of pyarrow crashes on JSON that is nested deeply or begins with `null`. Its messages for
an invalid byte or an empty file are not helpful.
"""

import re
from codecs import BOM_UTF8
from pathlib import Path

from tunedlens.errors import InputError
from tunedlens.files import MAX_DEPTH

_WITHIN_STRINGS = re.compile(rb'"[^"]*(?:"|$)')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def require_sound(file: Path) -> None:
    """Check that a file of JSON or CSV is UTF-8, not empty and, if it is JSON, not nested deeply.

    Raises:
        InputError: it is not.
    """
    depth, first, is_json = 0, b"", file.suffix.lower() != ".csv"
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                first = first or line.removeprefix(BOM_UTF8).lstrip(b"[ \t\r\n")
                line.decode("utf-8")
                if is_json:
                    depth = _depth(line, depth, f"{file}, line {number},")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{file} is not UTF-8 (line {number}, byte {error.start} is {byte:#04x}); convert it "
            "first"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    if not first:
        raise InputError(f"{file} is empty: expected rows with text")
    if is_json and not first.startswith(b"{"):
        raise InputError(f'{file} holds no rows: expected objects like {{"text": "..."}}')


def _depth(line: bytes, depth: int, what: str) -> int:
    """The depth after a line of JSON that begins at another depth."""
    line = line.replace(rb"\\", b"").replace(rb"\"", b"")
    for bracket in _WITHIN_STRINGS.sub(b"", line).translate(None, _NOT_BRACKETS):
        depth = depth + 1 if bracket in b"[{" else max(0, depth - 1)
        if depth > MAX_DEPTH:
            raise InputError(f"{what} is nested more than {MAX_DEPTH} deep")
    return depth
