"""From a config to a plan: defaults for what the config leaves open."""

import dataclasses
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from tunedlens.config import ONE_PASS, TrainConfig
from tunedlens.corpus import ResolvedCorpus, resolve_corpus
from tunedlens.engine.backend import Backend, fastest_backend
from tunedlens.errors import InputError
from tunedlens.fit import DEFAULT_HYPERPARAMETERS
from tunedlens.model import FrozenModel
from tunedlens.training.costs import Costs
from tunedlens.training.plan import TrainPlan

_BASELINE_TOKENS = 512_000
_BASELINE_STEP_TOKENS = 2048
_JACOBIAN_TOKENS = 8192
"""Each token takes d_model backward passes."""
_VOCAB_SAMPLE = 6144
_MIN_SAMPLED_VOCAB = 4 * _VOCAB_SAMPLE
"""A vocabulary of at most this size is not sampled."""
_CPU_MICRO_BATCH_TOKENS = 2048
"""Larger forward passes are not faster on a CPU."""


def resolve(config: TrainConfig, model: FrozenModel, accelerator: Accelerator) -> TrainPlan:
    """Choose everything that a config leaves open, for a model and a device.

    The main process measures the precision and the kernel for all processes.

    Raises:
        InputError: a setting does not fit the model, the device or another setting.
    """
    corpus = resolve_corpus(config.corpus, model.name, model.context, model.bos_id is not None)
    _require_possible(config, corpus, model, accelerator.num_processes)
    batch = _batch(config, corpus, model, accelerator.num_processes)
    fit = _fit_defaults(config, model)
    backend = _backend(config, model, accelerator)
    hyperparameters = {
        name: default if getattr(config, name) is None else getattr(config, name)
        for name, default in zip(("lr", "momentum", "weight_decay"), _defaults(config), strict=True)
    }
    settings = vars(config) | hyperparameters | fit._asdict() | batch._asdict() | backend._asdict()
    # Validation on a single block is the least; the plan's own costs say how many it affords.
    settings |= {"corpus": corpus, "validation_tokens": corpus.seq_len}
    plan = TrainPlan(**settings)
    tokens = config.validation_tokens or _validation_tokens(plan, model)
    return dataclasses.replace(plan, validation_tokens=tokens)


def _is_baseline(config: TrainConfig) -> bool:
    return config.fit not in ("preconditioned", *ONE_PASS)


def _defaults(config: TrainConfig) -> tuple[float, float, float]:
    return DEFAULT_HYPERPARAMETERS[config.fit if _is_baseline(config) else "preconditioned"]


def _require_possible(
    config: TrainConfig, corpus: ResolvedCorpus, model: FrozenModel, processes: int
) -> None:
    if config.kernel == "attention" and model.device.type != "cpu":
        raise InputError("--kernel attention is for CPUs; leave it out, or choose products")
    if config.skip_first >= corpus.seq_len:
        raise InputError(
            f"--skip-first must be less than --seq-len ({corpus.seq_len}), got {config.skip_first}"
        )
    if config.batch_size is not None and config.batch_size < processes:
        raise InputError(
            f"--batch-size must be at least the number of processes ({processes}), got "
            f"{config.batch_size}"
        )
    if processes > 1 and config.model.device is not None:
        raise InputError(
            f"--device cannot be given with {processes} processes, each of which has its own; "
            "leave it out"
        )
    exact = {"--precision bf16": config.precision == "bf16", "--vocab-sample": config.vocab_sample}
    for flag, is_given in exact.items():
        if is_given and model.unembedding.cap is not None:
            raise InputError(
                f"{flag} does not work with {model.name}, which caps its logits and is therefore "
                "fitted in float32 over its whole vocabulary; leave it out"
            )


class _FitDefaults(NamedTuple):
    tokens: int | None
    max_tokens: int
    init_tokens: int
    vocab_sample: int


def _fit_defaults(config: TrainConfig, model: FrozenModel) -> _FitDefaults:
    """The length of both parts of the fit, and the size of the vocabulary sample."""
    d_model, vocab_size = model.identity.d_model, model.identity.vocab_size
    tokens = config.tokens
    if tokens is None and _is_baseline(config):
        tokens = _BASELINE_TOKENS
    first_pass = {"closed-form": 1024 * d_model, "jacobian": _JACOBIAN_TOKENS}
    init_tokens = first_pass.get(config.fit, 128 * d_model)
    if tokens is not None:
        init_tokens = min(init_tokens, max(1, tokens // 4))
    sample = config.vocab_sample
    if sample is None:
        is_sampled = (
            vocab_size > _MIN_SAMPLED_VOCAB
            and config.fit == "preconditioned"
            and model.unembedding.cap is None
        )
        sample = _VOCAB_SAMPLE if is_sampled else 0
    return _FitDefaults(
        tokens,
        max_tokens=config.max_tokens or 2048 * d_model,
        init_tokens=config.init_tokens or init_tokens,
        vocab_sample=0 if sample >= vocab_size else sample,
    )


class _Batch(NamedTuple):
    batch_size: int
    micro_batch_size: int | None


def _batch(
    config: TrainConfig, corpus: ResolvedCorpus, model: FrozenModel, processes: int
) -> _Batch:
    positions = corpus.seq_len - config.skip_first
    step_tokens = _BASELINE_STEP_TOKENS if _is_baseline(config) else 4 * model.identity.d_model
    micro_batch_size = config.micro_batch_size
    if micro_batch_size is None and model.device.type == "cpu":
        micro_batch_size = max(1, _CPU_MICRO_BATCH_TOKENS // positions)
    default = max(processes, round(step_tokens / positions), 1)
    return _Batch(config.batch_size or default, micro_batch_size)


def _backend(config: TrainConfig, model: FrozenModel, accelerator: Accelerator) -> Backend:
    if model.unembedding.cap is not None:
        return Backend("fp32", "products")
    if config.precision is not None and config.kernel is not None:
        return Backend(config.precision, config.kernel)
    backend = Backend("fp32", "products")
    if accelerator.is_main_process:
        backend = fastest_backend(model.unembedding, config.precision, config.kernel)
    if accelerator.num_processes > 1:
        (backend,) = broadcast_object_list([backend])
    return backend


def _validation_tokens(plan: TrainPlan, model: FrozenModel) -> int:
    # A run without a budget may end long before its cap.
    expected = plan.budget if plan.tokens is not None else plan.budget // 4
    affordable = Costs.of(plan, model).validation_tokens(expected)
    return min(affordable, plan.evaluate_tokens or affordable)
