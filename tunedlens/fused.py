"""Functions fused by `torch.compile` where that works, and run as they are where it does not."""

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tunedlens.errors import first_line

_LOGITS_THAT_TAKE_AS_LONG = 1e10


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs there: a C++ compiler, or Triton."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and any(map(shutil.which, ("g++", "clang++", "c++")))


def is_worth_compiling(logits: float, device: torch.device) -> bool:
    """Whether fusing what is done to so many logits saves more seconds than it takes."""
    return can_compile(device) and logits > _LOGITS_THAT_TAKE_AS_LONG


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever device."""
    # On a CPU it is a plain RuntimeError of the allocator.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Fused:
    """A function, compiled if that is wanted and works.

    Args:
        function: of tensors of any size.
        compiled: whether compiling is wanted.
    """

    def __init__(self, function: Callable[..., Any], compiled: bool) -> None:
        self._plain = function
        self._compiled = torch.compile(function, dynamic=True) if compiled else None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(*args)
            except Exception as error:  # a compiler fails in its own ways
                if is_out_of_memory(error):
                    raise
                self._compiled = None
                message = f"torch.compile failed, going on without: {first_line(error)}"
                warnings.warn(message, stacklevel=2)
        return self._plain(*args)
