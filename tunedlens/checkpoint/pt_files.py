"""Reads and writes files of `torch.save`; no code in them is run."""

import io
import pickletools
import zipfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.files import read_bytes, write

_SHARED = {"BINUNICODE", "GLOBAL", "REDUCE", "BINPERSID", "EMPTY_DICT", "EMPTY_LIST"}
"""The operations whose results may occur several times in a pickle."""


def read_pt(path: Path) -> object:
    """Read tensors, numbers, strings and their containers; anything else is refused.

    Raises:
        InputError: the file is missing or damaged, or holds something that would run code.
    """
    content = read_bytes(path)
    try:
        _require_bounded(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any kind of exception
        raise InputError(
            f"{path} cannot be read: it is damaged, or it holds objects other than tensors and "
            "plain values, which could run code and are never loaded"
        ) from error


def _require_bounded(content: bytes) -> None:
    """Check that reading a file takes memory and time in proportion to its size.

    A compressed part could expand without bound. A tuple that holds another tuple twice, nested n
    times, takes time 2^n to hash.

    Raises:
        ValueError: it does not.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = archive.infolist()
        sizes = sum(part.file_size for part in parts)
        if sizes > len(content) or any(part.compress_type for part in parts):
            raise ValueError("its parts are compressed")
        pickles = [archive.read(part) for part in parts if part.filename.endswith(".pkl")]
    for pickle in pickles:
        previous = ""
        shared: set[object] = set()
        for operation, argument, _ in pickletools.genops(pickle):
            if operation.name.endswith("PUT"):
                (shared.add if previous in _SHARED else shared.discard)(argument)
            if operation.name.endswith("GET") and argument not in shared:
                raise ValueError("it holds a tuple twice")
            previous = operation.name


def write_pt(path: Path, content: object) -> None:
    """Write a file as `torch.save` does, completely or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def checked(value: object, shape: tuple[int, ...], what: str) -> Float[Tensor, "..."]:
    """The value as a float32 tensor.

    Args:
        what: the name of the value in the message.

    Raises:
        InputError: it is not a tensor of this shape, or not all of it is finite.
    """
    is_right = (
        isinstance(value, Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and (value.is_floating_point(), value.shape) == (True, shape)
    )
    if not isinstance(value, Tensor) or not is_right:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{what} must be a floating-point tensor of shape {shape}, got {came}")
    value = value.float()
    if not value.isfinite().all():
        raise InputError(f"{what} holds values that are not finite in float32")
    return value
