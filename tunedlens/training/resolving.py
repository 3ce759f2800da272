"""Makes a plan from a config: chooses a value for every setting that the config leaves open."""

import dataclasses
import math
import os

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from tunedlens.config import BASELINES, TrainConfig
from tunedlens.corpus import SELF, ResolvedCorpus, resolve_corpus
from tunedlens.engine.backend import Backend, fastest_backend
from tunedlens.errors import InputError
from tunedlens.fit import DEFAULT_HYPERPARAMETERS, MIN_TOKENS_PER_DIMENSION
from tunedlens.model import TRANSLATED_SITES, FrozenModel, HookPoint, ModelShape, shape_of
from tunedlens.training.plan import Costs, TrainPlan

_BASELINE_TOKENS = 512_000
_BASELINE_STEP_TOKENS = 2048
_JACOBIAN_TOKENS = 8192
"""Each token takes d_model backward passes."""
_VOCAB_SAMPLE = 6144
_MIN_SAMPLED_VOCAB = 4 * _VOCAB_SAMPLE
"""A vocabulary of at most this size is not sampled."""
_COPIES = 8
"""Copies of the translators in training: lens, result, gradient and five in the optimizer."""
_CPU_MICRO_BATCH_TOKENS = 2048
"""Larger forward passes are not faster on a CPU."""


def resolve(config: TrainConfig, model: FrozenModel, accelerator: Accelerator) -> TrainPlan:
    """Choose everything that a config leaves open, for a model and a device.

    The main process measures the precision and the kernel for all processes.

    Raises:
        InputError: a setting does not fit the model, the device or another setting.
    """
    processes, shape = accelerator.num_processes, shape_of(model)
    corpus = resolve_corpus(config.corpus, model.name, model.context, model.bos_id is not None)
    _require_possible(config, corpus, model, processes)
    defaults = _defaults(config, corpus, shape, model.device.type)
    plan = _completed(config, corpus, shape, defaults | _backend(config, model, accelerator))
    _require_memory(plan, model, processes)
    if config.shard_layers is None:
        shards = needs_shards(plan, shape, processes, _memory_bytes(model.device))
        plan = dataclasses.replace(plan, shard_layers=shards)
    if corpus.dataset == SELF and corpus.self_tokens is None:
        held_out = plan.validation_tokens + Costs(plan, shape).table_tokens(plan.budget)
        blocks = -(-(plan.init_tokens + plan.budget + held_out) // plan.positions)
        corpus = dataclasses.replace(corpus, self_tokens=blocks * corpus.seq_len)
        plan = dataclasses.replace(plan, corpus=corpus)
    return plan


def resolve_without_model(config: TrainConfig, shape: ModelShape, device: str) -> TrainPlan:
    """The plan of a run whose model is not loaded.

    Nothing is measured: where the config leaves them open, the precision is bf16 and the kernel is
    `products`. Whether the blocks of the model have the sites is not checked.

    Args:
        device: the type of the device, cpu or cuda.

    Raises:
        InputError: a setting does not fit the model.
    """
    corpus = resolve_corpus(config.corpus, shape.name, shape.context)
    defaults = _defaults(config, corpus, shape, device)
    backend = {"precision": "fp32" if shape.is_capped else "bf16", "kernel": "products"}
    return _completed(config, corpus, shape, defaults | backend)


def _completed(
    config: TrainConfig, corpus: ResolvedCorpus, shape: ModelShape, defaults: dict[str, object]
) -> TrainPlan:
    """The config with the defaults, and with as much validation as the run can afford."""
    if config.shard_layers and config.fit in (*BASELINES, "jacobian"):
        raise InputError(
            f"--shard-layers works with --fit preconditioned and closed-form, not {config.fit}"
        )
    settings = vars(config) | {"corpus": corpus, "layers": _layers(config, shape)}
    settings |= {name: value for name, value in defaults.items() if settings[name] is None}
    if settings["vocab_sample"] >= shape.vocab_size:
        settings["vocab_sample"] = 0
    plan = TrainPlan(**settings)
    if config.validation_tokens is None:
        # A run without a budget may end long before its cap.
        expected = plan.budget if plan.tokens is not None else plan.budget // 4
        affordable = Costs(plan, shape).validation_tokens(expected)
        tokens = min(affordable, plan.evaluate_tokens or affordable)
        plan = dataclasses.replace(plan, validation_tokens=tokens)
    return plan


def _layers(config: TrainConfig, shape: ModelShape) -> str | None:
    """The layers that get translators, counted from 0 and in ascending order; None for all."""
    chosen, count = config.chosen_layers, shape.n_layers
    if chosen is None:
        return None
    if wrong := [layer for layer in chosen if not -count <= layer < count]:
        raise InputError(
            f"--layers must be between 0 and {count - 1} (or {-count} and -1, from the end) for "
            f"{shape.name}; got {wrong[0]}"
        )
    return ",".join(map(str, sorted({layer % count for layer in chosen})))


def _require_possible(
    config: TrainConfig, corpus: ResolvedCorpus, model: FrozenModel, processes: int
) -> None:
    further = config.further_sites
    if unknown := [site for site in further if site not in TRANSLATED_SITES]:
        raise InputError(
            f"--sites must be some of {', '.join(TRANSLATED_SITES)}, separated by commas; got "
            f"{', '.join(unknown)}"
        )
    if further:
        # If a block has no such site, the error is raised here and not after the first batch.
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        model.states_at([HookPoint(site, 0) for site in further], ids)
    if config.low_rank is not None and config.low_rank > model.identity.d_model:
        raise InputError(
            f"--low-rank must be at most {model.identity.d_model}, the width of {model.name}; got "
            f"{config.low_rank}"
        )
    if config.fit == "jacobian" and model.is_sharded:
        raise InputError(
            "--fit jacobian differentiates the model, which does not work with --fsdp; leave one "
            "of them out"
        )
    if config.kernel == "attention" and model.device.type != "cpu":
        raise InputError("--kernel attention works only on CPUs; leave it out, or choose products")
    if config.skip_first >= corpus.seq_len:
        raise InputError(
            f"--skip-first must be less than --seq-len ({corpus.seq_len}), got {config.skip_first}"
        )
    if config.shuffle_window and not corpus.streaming:
        raise InputError(
            "--shuffle-window works only with --streaming, because a text in memory is always "
            "shuffled as a whole; leave it out"
        )
    if processes > 1 and config.model.device not in (None, "cpu", model.device.type):
        raise InputError(
            f"--device {config.model.device} cannot be given with {processes} processes, because "
            "each has its own; leave it out"
        )
    if processes > 1 and config.model.device_map is not None:
        raise InputError(
            f"--device-map cannot be given with {processes} processes, because each has its own "
            "device; leave it out"
        )
    exact = {"--precision bf16": config.precision == "bf16", "--vocab-sample": config.vocab_sample}
    for flag, is_given in exact.items():
        if is_given and model.unembedding.cap is not None:
            raise InputError(
                f"{flag} does not work with {model.name}, which caps its logits and is therefore "
                "fitted in float32 over its whole vocabulary; leave it out"
            )


def _require_memory(plan: TrainPlan, model: FrozenModel, processes: int) -> None:
    """Check that the states that a step holds at a time fit into the memory of the device."""
    held, flag = -(-plan.batch_size // processes) * plan.positions, "--batch-size"
    if plan.micro_batch_size is not None and not plan.vocab_sample:
        held = min(held, plan.micro_batch_size * plan.positions)
        flag += " or --micro-batch-size"
    n_states = len(plan.points(model.identity.n_layers)) + 1
    ids = 16 * plan.batch_size * plan.corpus.seq_len
    needed, memory = 4 * held * n_states * model.identity.d_model + ids, _memory_bytes(model.device)
    if needed > memory:
        raise InputError(
            f"a step holds {needed / 1e9:,.0f} GB of states at a time, but {model.device} has "
            f"{memory / 1e9:,.0f} GB of memory; give a smaller {flag}"
        )


def needs_shards(plan: TrainPlan, shape: ModelShape, processes: int, memory: float) -> bool:
    """Whether the lens, its gradient and the optimizer take more than half of a device's memory."""
    needed = 4 * _COPIES * len(plan.points(shape.n_layers)) * shape.d_model**2
    return needed > memory / 2 and can_divide(plan, shape, processes)


def can_divide(plan: TrainPlan, shape: ModelShape, processes: int) -> bool:
    """Whether the layers of a fit can be divided among several processes, at least one for each."""
    layers = {point.layer for point in plan.points(shape.n_layers)}
    return plan.fit not in (*BASELINES, "jacobian") and 1 < processes <= len(layers)


def _memory_bytes(device: torch.device) -> float:
    """The memory of a device; infinite if it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


def _defaults(
    config: TrainConfig, corpus: ResolvedCorpus, shape: ModelShape, device: str
) -> dict[str, object]:
    """The defaults of all settings but the backend."""
    d_model, positions = shape.d_model, corpus.seq_len - config.skip_first
    is_baseline = config.fit in BASELINES
    tokens = config.tokens or (_BASELINE_TOKENS if is_baseline else None)
    init_tokens = {"closed-form": 1024 * d_model, "jacobian": _JACOBIAN_TOKENS}.get(
        config.fit, MIN_TOKENS_PER_DIMENSION * d_model
    )
    if tokens is not None:
        init_tokens = min(init_tokens, max(1, tokens // 4))
    step_tokens = _BASELINE_STEP_TOKENS if is_baseline else 4 * d_model
    is_sampled = (
        config.fit == "preconditioned"
        and shape.vocab_size > _MIN_SAMPLED_VOCAB
        and not shape.is_capped
    )
    micro_batch_size = max(1, _CPU_MICRO_BATCH_TOKENS // positions)
    lr, momentum, weight_decay = DEFAULT_HYPERPARAMETERS[
        config.fit if is_baseline else "preconditioned"
    ]
    return {
        "tokens": tokens,
        "max_tokens": 2048 * d_model,
        "init_tokens": init_tokens,
        "batch_size": max(round(step_tokens / positions), 1),
        "micro_batch_size": micro_batch_size if device == "cpu" else None,
        "vocab_sample": _VOCAB_SAMPLE if is_sampled else 0,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "validation_tokens": corpus.seq_len,  # one block, until the affordable number is known
    }


def _backend(
    config: TrainConfig, model: FrozenModel, accelerator: Accelerator
) -> dict[str, object]:
    """The given precision and kernel, or else the fastest."""
    if model.unembedding.cap is not None:
        return {"precision": "fp32", "kernel": "products"}
    if config.precision is not None and config.kernel is not None:
        return {}
    backend = Backend("fp32", "products")
    if accelerator.is_main_process:
        backend = fastest_backend(model.unembedding, config.precision, config.kernel)
    if accelerator.num_processes > 1:
        (backend,) = broadcast_object_list([backend])
    return backend._asdict()
