"""Work that several processes share."""

from accelerate import Accelerator
from torch import Tensor


def reduce_sums(accelerator: Accelerator, *sums: Tensor) -> None:
    """Add up the sums of all processes, in each of them and in place."""
    if accelerator.num_processes > 1:
        for part in sums:
            part.copy_(accelerator.reduce(part.to(accelerator.device), "sum"))
