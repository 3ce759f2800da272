"""Files of `torch.save`, read so that nothing in them can run."""

import io
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.files import write


def read_pt(path: Path) -> object:
    """Read tensors, numbers, strings and their containers; anything else is refused.

    Raises:
        InputError: the file is missing or damaged, or holds something that would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except Exception as error:  # a damaged file can raise any kind of exception
        raise InputError(
            f"{path} cannot be read: it is damaged, or it holds more than tensors and plain "
            "values, which could run code and is never read"
        ) from error


def write_pt(path: Path, content: object) -> None:
    """Write a file as `torch.save` does, never half-written.

    Raises:
        InputError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def checked(value: object, shape: tuple[int, ...], what: str) -> Float[Tensor, "..."]:
    """The value as a float32 tensor.

    Args:
        what: what the message calls the value.

    Raises:
        InputError: it is not a tensor of this shape, or not all of it is finite.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != shape:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{what} must be a floating-point tensor of shape {shape}, got {came}")
    if not value.isfinite().all():
        raise InputError(f"{what} holds values that are no number")
    return value.float()
