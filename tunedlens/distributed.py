"""Processes that share the work, as `torchrun` or `accelerate launch` start them."""

import atexit
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, get_int_from_env, parse_flag_from_env
from torch import Tensor

from tunedlens.errors import InputError, first_line

T = TypeVar("T")

_WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
"""The environment variables in which torchrun and MPI store the number of processes."""


def join_processes(device: str | torch.device | None = None) -> Accelerator:
    """Connect this process to the others that were started with it, if there are any.

    It must be called before any other use of accelerate, whose first object decides how processes
    communicate: over gloo on CPUs and if processes share a GPU, otherwise over NCCL.

    Args:
        device: the device in the config. With `cpu`, several processes do not use GPUs.

    Raises:
        InputError: several processes were started, but they cannot share the work.
    """
    started = get_int_from_env(_WORLD_SIZES, 1)
    if started == 1 and parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ:
        raise InputError(
            "accelerate launch started one process, because it starts several only on GPUs; on "
            "CPUs, use: torchrun --nproc_per_node 2 train.py"
        )
    on_cpu = not torch.accelerator.is_available() or (
        device is not None and torch.device(device).type == "cpu"
    )
    on_one_gpu = get_int_from_env(["LOCAL_WORLD_SIZE"], 1) > torch.accelerator.device_count()
    backend = "gloo" if on_one_gpu and not on_cpu else None
    handlers = [InitProcessGroupKwargs(backend=backend)] if backend else []
    accelerator = Accelerator(cpu=started > 1 and on_cpu, kwargs_handlers=handlers)
    if accelerator.num_processes != started:
        raise InputError(
            f"{started} processes were started, but accelerate does not connect them "
            f"({accelerator.device.type}, {accelerator.num_processes} process), so each would do "
            "all the work; start one process, or give --device cpu"
        )
    atexit.register(_disconnect)
    return accelerator


def _disconnect() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def lost_process(error: RuntimeError) -> str | None:
    """The reason why processes can no longer communicate; None if the error has another cause."""
    text, kinds = str(error), getattr(torch.distributed, "DistError", ())
    if "/gloo/" not in text and not isinstance(error, kinds):
        return None
    # gloo puts its source line before the reason, and advice after it.
    return text.split("] ", 1)[-1].split(". ")[0]


def reduce_sums(accelerator: Accelerator, *sums: Tensor) -> None:
    """Add up the sums of all processes, in each of them and in place."""
    if accelerator.num_processes > 1:
        for part in sums:
            part.copy_(accelerator.reduce(part.to(accelerator.device), "sum"))


def rank_and_count() -> tuple[int, int]:
    """The number of this process, counted from 0, and the number of processes that are joined."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather(compute: Callable[[], T]) -> list[T]:
    """Call a function in every process, and return the results of all processes in each of them.

    If the function fails in one process, all processes raise, so no process waits for another.

    Args:
        compute: must not communicate with other processes. Its result must be picklable.

    Raises:
        InputError: the function fails in another process.
    """
    _, count = rank_and_count()
    if count == 1:
        return [compute()]
    values: list[T] = []
    failure = None
    try:
        values.append(compute())
    except Exception as error:
        failure = error
    results: list[tuple[list[T], str | None]] = [([], None)] * count
    own = (values, None if failure is None else first_line(failure))
    torch.distributed.all_gather_object(results, own)
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(results):
        if message is not None:
            raise InputError(f"process {rank}: {message}")
    return [value for values, _ in results for value in values]


def together(compute: Callable[[], T]) -> T:
    """Call a function in every process, and return the result of this process.

    Raises:
        InputError: the function fails in another process.
    """
    values: list[T] = []
    gather(lambda: values.append(compute()))
    return values[0]
