"""Computes what a run needs before it is started: memory, operations, tokens and hours."""

import bisect
import dataclasses
from dataclasses import dataclass
from typing import Any

from tunedlens.config import BASELINES, TrainConfig
from tunedlens.errors import InputError
from tunedlens.model import ModelShape, load_shape
from tunedlens.training.memory import Memory, MemoryModel
from tunedlens.training.plan import Costs, TrainPlan
from tunedlens.training.resolving import can_divide, needs_shards, resolve_without_model

TFLOPS = {"cpu": 0.5, "cuda": 100.0}
"""The assumed speed of a device, in 10^12 operations per second, as `Costs` counts operations.

On an H100, the steps of `benchmarks/README.md` reach 30 to 120, which is 4 to 16 % of its
761 TFLOP/s in bfloat16. Two cores of a CPU reach 0.5 in a run on SmolLM2-135M.
"""
_SOLUTION_FLOPS = 80
"""The closed form of a layer takes this number of operations times d_model³: two
eigendecompositions and nine ridges."""
_FLOAT64_COST = {"cpu": 10, "cuda": 100}
"""The cost of an eigendecomposition in float64 relative to products in bfloat16. The value for a
GPU is a guess."""
_USABLE = 0.9
"""The fraction of memory that tensors can fill; libraries and allocators take the rest."""


@dataclass(frozen=True)
class RunSize:
    """The memory, the operations and the time that a run needs."""

    shape: ModelShape
    plan: TrainPlan
    device: str
    processes: int
    devices: int
    memory: Memory
    """The memory of one process."""
    limit: float | None
    """Bytes of a device's memory, if they are known."""
    flops_per_second: float
    """The assumed speed of one process."""

    @property
    def fits(self) -> bool:
        """Whether a device has the memory, with a tenth of it left for libraries."""
        return self.limit is None or self.memory.peak <= _USABLE * self.limit

    @property
    def costs(self) -> Costs:
        """Operations per token."""
        return Costs(self.plan, self.shape)

    @property
    def seconds(self) -> float:
        """The time of the longest run that the plan allows."""
        # Every process takes the optimizer's steps and solves the least squares for its layers.
        costs, tokens = self.costs, self.plan.budget
        dividing = self.processes if self.plan.shard_layers else 1
        repeated = tokens * costs.optimizer
        shared = (costs.run(tokens) - repeated) / self.processes
        repeated /= dividing
        solution = 0.0
        if self.plan.fit not in ("jacobian", *BASELINES):
            points = len(self.plan.points(self.shape.n_layers))
            solution = _SOLUTION_FLOPS * points * self.shape.d_model**3 / dividing
        return (shared + repeated + _FLOAT64_COST[self.device] * solution) / self.flops_per_second


def size_run(
    config: TrainConfig,
    *,
    gpus: int = 1,
    memory_gb: float | None = None,
    tflops: float | None = None,
    shape: ModelShape | None = None,
) -> RunSize:
    """Compute what a run needs from the configuration file of its model.

    Each GPU has a process, unless a device map spreads the model over all of them in one process.

    Args:
        config: the config of the run; `model.device` may be cpu.
        gpus: the number of GPUs; 0 for a CPU.
        memory_gb: the memory of one GPU, or of the machine without GPUs, in 10^9 bytes.
        tflops: the speed of a device, in 10^12 operations per second; see `TFLOPS`.
        shape: the shape of the model; by default it is read from the model's configuration.

    Raises:
        InputError: there is no such model, or a setting does not fit it.
    """
    on_cpu = gpus == 0 or config.model.device == "cpu"
    numbers = {"--gpus": (gpus, 0), "--memory": (memory_gb, 1e-9), "--tflops": (tflops, 1e-9)}
    for flag, (value, least) in numbers.items():
        if value is not None and not least <= value < float("inf"):
            raise InputError(
                f"{flag} must be {'0 or more' if not least else 'above 0'}, got {value}"
            )
    device = "cpu" if on_cpu else "cuda"
    devices = 1 if on_cpu else gpus
    is_spread, is_sharded = config.model.device_map is not None, config.model.fsdp
    processes = 1 if is_spread else devices
    shape = load_shape(config.model) if shape is None else shape
    if is_sharded and (processes == 1 or not shape.has_fsdp_plan):
        raise InputError(
            f"--fsdp divides the weights of {shape.name} among processes, but "
            + ("there is one" if processes == 1 else "transformers has no plan for that")
        )
    plan = resolve_without_model(config, shape, device)
    limit = None if memory_gb is None else 1e9 * memory_gb
    if plan.shard_layers is None:
        shards = needs_shards(plan, shape, processes, limit or float("inf"))
        plan = dataclasses.replace(plan, shard_layers=shards)
    memory = MemoryModel(
        plan,
        shape,
        device,
        processes=processes,
        spread=devices if is_spread or is_sharded else 1,
        limit=limit or float("inf"),
    ).memory()
    rate = 1e12 * (tflops or TFLOPS[device])
    return RunSize(shape, plan, device, processes, devices, memory, limit, rate)


def ways_to_fit(config: TrainConfig, size: RunSize) -> list[tuple[str, RunSize]]:
    """Flags that make a run fit, each with the size of the run with these flags.

    Changes are tried one by one, then all together, and finally with fewer layers in each run.
    """
    changes: list[TrainConfig] = []
    model, smaller = config.model, dataclasses.replace(config, micro_batch_size=1)
    if size.plan.vocab_sample:
        # A sample is drawn when the states of all micro-batches of a step are known.
        smaller = dataclasses.replace(smaller, vocab_sample=0)
    if size.device != "cpu" and model.dtype == "float32":
        changes.append(_with_model(config, dtype="bfloat16"))
        smaller = _with_model(smaller, dtype="bfloat16")
    if size.devices > 1 and model.device_map is None:
        spread = [_with_model(changed, device_map="auto") for changed in (config, *changes)]
        can_shard = can_divide(size.plan, size.shape, size.processes)
        if can_shard and not size.plan.shard_layers:
            changes += [dataclasses.replace(c, shard_layers=True) for c in (config, *changes)]
        if size.shape.has_fsdp_plan and config.fit != "jacobian":
            if not model.fsdp:
                changes += [_with_model(c, fsdp=True) for c in (config, *changes)]
            smaller = _with_model(smaller, fsdp=True)
            smaller = dataclasses.replace(smaller, shard_layers=can_shard)
        else:
            smaller = _with_model(smaller, device_map="auto")
        changes += [] if model.fsdp else spread
    gpus = 0 if size.device == "cpu" else size.devices
    limit = None if size.limit is None else size.limit / 1e9

    def resized(changed: TrainConfig) -> RunSize:
        return size_run(changed, gpus=gpus, memory_gb=limit, shape=size.shape)

    tried = [(_flags(config, changed), resized(changed)) for changed in [*changes, smaller]]
    if not any(new.fits for _, new in tried):
        chosen = config.chosen_layers or list(range(size.shape.n_layers))
        counts = range(size.processes if smaller.shard_layers else 1, len(chosen))
        fewer = [dataclasses.replace(smaller, layers=_some(chosen, n)) for n in counts]
        # More layers take more memory.
        if found := bisect.bisect(fewer, 0, key=lambda changed: not resized(changed).fits):
            count = counts[found - 1]
            runs = -(-len(chosen) // count)
            flags = (
                f"{_flags(config, smaller)} and {runs} runs, each with --layers of {count} layers"
            )
            tried.append((flags, resized(fewer[found - 1])))
    return [(flags, new) for flags, new in tried if new.fits]


def _with_model(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _some(layers: list[int], count: int) -> str:
    return ",".join(map(str, layers[:count]))


def _flags(before: TrainConfig, after: TrainConfig) -> str:
    """The flags in which two configs differ."""
    parts = [(before.model, after.model), (before, after)]
    changes = [
        (field.name, getattr(new, field.name))
        for old, new in parts
        for field in dataclasses.fields(old)
        if "help" in field.metadata and getattr(old, field.name) != getattr(new, field.name)
    ]
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in changes
    )
