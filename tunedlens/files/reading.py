"""Reads files that may come from a stranger.

A file is read only if it is a regular file of a bounded size. No code in it is run, and every
fault in it raises an `InputError`.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import safetensors
import safetensors.torch
import torch
import yaml
from jaxtyping import Shaped
from torch import Tensor

from tunedlens.errors import InputError, first_line

MAX_JSON_BYTES = 64 * 2**20
MAX_YAML_BYTES = 64 * 2**10
MAX_DEPTH = 64
"""The largest depth of nested lists and objects in JSON or YAML."""
_MAX_INTEGER = 2**63


class TensorFile(NamedTuple):
    """The content of a safetensors file."""

    tensors: dict[str, Shaped[Tensor, "..."]]
    metadata: dict[str, str]
    sha256: str
    """The hash of the whole file."""


class TensorHeader(NamedTuple):
    """The header of a safetensors file."""

    names: list[str]
    metadata: dict[str, str]


def read_bytes(path: Path, if_missing: str | None = None, max_bytes: int | None = None) -> bytes:
    """Read a whole file.

    Args:
        if_missing: the message if there is no such file.
        max_bytes: the largest size that is read; None for any.

    Raises:
        InputError: the file is missing, too large or not a regular file, or cannot be read.
    """
    with _opened(path, if_missing) as file:
        content = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes:,} bytes, the limit")
    return content


@contextmanager
def _opened(path: Path, if_missing: str | None) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("it is not a regular file")
            yield file
    except FileNotFoundError:
        raise InputError(if_missing or f"there is no file {path}") from None
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise any kind of exception
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot read {path}: {reason}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; opening a FIFO would otherwise wait for somebody to write to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: Path, if_missing: str | None = None, max_bytes: int | None = None) -> str:
    """Read a text without any change: newlines are not translated, and no byte is left out.

    Raises:
        InputError: as `read_bytes`, or the text is not UTF-8.
    """
    content = read_bytes(path, if_missing, max_bytes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start} is {content[error.start]:#04x}); convert it "
            "first"
        ) from error


def read_json(path: Path, if_missing: str | None = None, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        InputError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, if_missing, max_bytes), str(path))


def parse_json(text: str, what: str) -> Any:
    """Parse JSON, with finite numbers and strings that can be written as UTF-8.

    Args:
        what: the name of the text in the message.

    Raises:
        InputError: it is not such JSON, or it is nested more than `MAX_DEPTH` deep.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        _require_plain(data)
    except RecursionError:
        raise InputError(f"{what} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{what} is damaged: {first_line(error)}") from error
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}")


def _require_plain(data: object) -> None:
    """Check the depth, the numbers and the strings of JSON or YAML, level by level."""
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        inner: list[object] = []
        for value in level:
            if isinstance(value, str):
                value.encode()  # raises a ValueError for half a surrogate pair
            elif isinstance(value, int | float):
                if not abs(value) < (_MAX_INTEGER if isinstance(value, int) else math.inf):
                    raise ValueError(f"the number {value!s:.40} is too large")
            elif isinstance(value, dict):
                inner += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple | set):
                inner += value
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML of plain values. Aliases are refused: a few lines of them can expand to gigabytes.

    Raises:
        InputError: it is not such YAML, or it is nested more than `MAX_DEPTH` deep.
    """
    if len(text) > MAX_YAML_BYTES:
        raise InputError(f"{what} is larger than {MAX_YAML_BYTES:,} bytes, the limit")
    try:
        data = yaml.load(text, _PlainLoader)  # a SafeLoader
        _require_plain(data)
    except RecursionError:
        raise InputError(f"{what} is damaged: it is nested too deeply") from None
    except Exception as error:  # the constructors of the loader raise many kinds of exception
        raise InputError(f"{what} is damaged: {' '.join(str(error).split())}") from error
    return data


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases."""

    def compose_node(self, parent: object, index: object) -> object:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "expected a value, got an alias", mark)
        return super().compose_node(parent, index)


def read_tensors(
    path: Path,
    if_missing: str | None = None,
    *,
    dtypes: Collection[torch.dtype] = (torch.float32,),
) -> TensorFile:
    """Read a safetensors file.

    This takes about twice the size of the file in memory, for any content of the file.

    Args:
        dtypes: the accepted dtypes.

    Raises:
        InputError: as `read_bytes`, or the file is damaged or holds another dtype.
    """
    content = read_bytes(path, if_missing)
    try:
        tensors = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except Exception as error:  # a damaged file can raise any kind of exception
        raise InputError(f"{path} is damaged: {first_line(error)}") from error
    for name, value in tensors.items():
        if value.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            came = str(value.dtype).removeprefix("torch.")
            raise InputError(f"{path} is damaged: expected {expected}, got {came} ({name})")
    return TensorFile(tensors, metadata, hashlib.sha256(content).hexdigest())


def read_tensor_header(path: Path, if_missing: str | None = None) -> TensorHeader:
    """Read the header of a safetensors file, without the tensors.

    Raises:
        InputError: as `read_tensors`.
    """
    with _opened(path, if_missing), safetensors.safe_open(path, "pt") as file:
        return TensorHeader(list(file.keys()), file.metadata() or {})


def require_finite(tensors: Mapping[str, Shaped[Tensor, "..."]], path: Path) -> None:
    """Check that all values of a file are finite.

    Raises:
        InputError: a value is infinite or NaN.
    """
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise InputError(f"{path} holds values that are not finite ({name}); train it again")
