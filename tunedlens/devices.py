"""What is particular to accelerators: copies, float64, the precision of float32 products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SPARE = 4
"""A device keeps sums that take up to a quarter of its free memory."""


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the CPU to a device; a GPU's queue is not waited for."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's GPUs do not."""
    return device.type != "mps"


def device_of_sums(device: torch.device, elements: int) -> torch.device:
    """Where sums in float64 are kept: on the device, or on the CPU if they do not fit there."""
    fits = has_float64(device)
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        fits = SPARE * 8 * elements <= free_bytes
    return device if fits else torch.device("cpu")


@contextmanager
def float32_products() -> Iterator[None]:
    """Take float32 products in float32, also where the user allows TF32 or bfloat16 for them."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
