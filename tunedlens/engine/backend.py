"""The precision and the kernel that compute the objective fastest on this machine."""

import math
import time
from itertools import product
from typing import NamedTuple, get_args

import torch

from tunedlens.config import Kernel, Precision
from tunedlens.engine.objective import LensKL
from tunedlens.engine.vocab_sample import VocabSample
from tunedlens.model import Unembedding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOKENS, _MAX_ROWS, _ROUNDS, _MARGIN = 512, 8192, 3, 1.2


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
    device, (vocab_size, d_model) = unembedding.weight.device, unembedding.weight.shape
    on_cpu = device.type == "cpu"
    precisions = [precision] if precision else list(get_args(Precision))
    kernels = [kernel] if kernel else list(get_args(Kernel) if on_cpu else ("products",))
    candidates = [Backend(*pair) for pair in product(precisions, kernels)]
    if not on_cpu and precision is None and not _multiplies_bfloat16(device):
        candidates = [candidate for candidate in candidates if candidate.precision == "fp32"]
    if len(candidates) == 1:
        return candidates[0]
    ids = torch.arange(min(vocab_size, _MAX_ROWS), device=device)
    sample = VocabSample(ids, torch.zeros(len(ids), device=device))
    rows = Unembedding(unembedding.norm, unembedding.weight[ids], None)
    hidden = torch.randn(_TOKENS, d_model, generator=torch.Generator().manual_seed(0)).to(device)
    best, least = candidates[0], math.inf
    for candidate in candidates:
        seconds = _seconds(candidate, rows, hidden, sample)
        if seconds < least / _MARGIN:
            best, least = candidate, seconds
    return best


def _multiplies_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _seconds(
    backend: Backend, rows: Unembedding, hidden: torch.Tensor, sample: VocabSample
) -> float:
    """Time of one gradient: the minimum of several, after a warm-up."""
    objective = LensKL(rows, dtype=DTYPES[backend.precision], kernel=backend.kernel)
    model, keys = objective.model_side(hidden), objective.keys(sample)
    times = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        objective.gradient(hidden, model, keys)
        if hidden.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
