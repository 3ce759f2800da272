"""The precision and the kernel that compute the objective fastest on this machine."""

import time
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple, get_args

import torch

from tunedlens.config import Kernel, Precision
from tunedlens.engine.objective import LensKL
from tunedlens.model import Unembedding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOKENS = {"cpu": 512, "cuda": 8192}
_MAX_ROWS = {"cpu": 8192, "cuda": 32_768}
"""A GPU needs large products: small ones take as long as it takes to start them."""
_ROUNDS, _MARGIN = 3, 1.2


class Backend(NamedTuple):
    """How the objective is computed."""

    precision: Precision
    kernel: Kernel


def fastest_backend(
    unembedding: Unembedding, precision: Precision | None = None, kernel: Kernel | None = None
) -> Backend:
    """Time every candidate for a fraction of a second on products of the unembedding's shape.

    A candidate replaces an earlier one only if it is 1.2 times as fast. Otherwise the choice,
    and with it the last digits of a lens, would change from run to run.

    Args:
        unembedding: on the device of the run.
        precision: restricts the candidates to one precision.
        kernel: restricts the candidates to one kernel.
    """
    weight, kind = unembedding.weight, unembedding.weight.device.type
    on_cpu = kind == "cpu"
    has_bf16 = on_cpu or (
        kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    precisions = [precision] if precision else get_args(Precision) if has_bf16 else ["fp32"]
    kernels = [kernel] if kernel else get_args(Kernel) if on_cpu else ["products"]
    candidates = [Backend(*pair) for pair in product(precisions, kernels)]
    if len(candidates) == 1:
        return candidates[0]
    rows = Unembedding(unembedding.norm, weight[: _MAX_ROWS[kind]], None)
    hidden = torch.randn(_TOKENS[kind], weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(weight.device)
    best, *others = zip(candidates, _seconds(candidates, rows, hidden), strict=True)
    for candidate in others:
        if candidate[1] < best[1] / _MARGIN:
            best = candidate
    return best[0]


def _seconds(backends: Sequence[Backend], rows: Unembedding, hidden: torch.Tensor) -> list[float]:
    """Time of one gradient with each backend: the minimum of several, after a warm-up.

    The backends take turns, so that other work on the machine slows all of them.
    """
    objectives = [LensKL(rows, dtype=DTYPES[one.precision], kernel=one.kernel) for one in backends]
    models = [objective.model_side(hidden) for objective in objectives]
    times: list[list[float]] = [[] for _ in backends]
    for _ in range(_ROUNDS + 1):
        for objective, model, own in zip(objectives, models, times, strict=True):
            start = time.perf_counter()
            objective.gradient(hidden, model)
            if hidden.device.type == "cuda":
                torch.cuda.synchronize()
            own.append(time.perf_counter() - start)
    return [min(own[1:]) for own in times]
