"""Functions that depend on the accelerator: copies, float64, precision of float32 products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SPARE = 4
"""Sums are kept on a device if they take at most a quarter of its free memory."""


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the CPU to a device, without waiting for a GPU."""
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
    """Compute float32 products in full precision, even if the user allows TF32 or bfloat16."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
